"""Say in one line whether moeship's CPU kernels are there: python -m trt_build.ort.kernels.

The line goes to stdout where they are, to stderr where not, with what that costs and what to do. Exit status 0.
"""

import sys

from trt_build.ort.kernels import found_fault, library, remedy


def main() -> None:
    fault = found_fault()
    if fault is None:
        sys.stdout.write(f"moeship's CPU kernels: {library()}\n")
        return
    sys.stderr.write(
        f"moeship's CPU kernels are not used: {fault}; int8 and int4 engines for the CPU are built for ONNX "
        f"Runtime's, which decode at two thirds of the speed or less; {remedy()}\n"
    )


if __name__ == "__main__":
    main()
