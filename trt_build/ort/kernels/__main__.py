"""Prints in one line whether moeship's CPU kernels can be used: python -m trt_build.ort.kernels.

The line goes to stdout if they can be used. If not, it goes to stderr and says what that costs and what to do. The exit
status is 0 in both cases.
"""

import sys

from trt_build.errors import EngineError
from trt_build.ort.kernels import found_fault, library


def main() -> None:
    fault = found_fault()
    if fault is not None:
        sys.stderr.write(
            f"moeship's CPU kernels are not used: {fault.reason}; int8 and int4 engines for the CPU are built for ONNX "
            f"Runtime's, which decode at two thirds of the speed or less; {fault.remedy}\n"
        )
        return
    try:
        sys.stdout.write(f"moeship's CPU kernels: {library()}\n")
    except EngineError as error:
        sys.stderr.write(f"{error}\n")


if __name__ == "__main__":
    main()
