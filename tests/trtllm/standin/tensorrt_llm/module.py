"""Stands for tensorrt_llm/module.py: a tree of modules and parameters with the names that checkpoints use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tensorrt_llm._utils import activations
from tensorrt_llm.parameter import Parameter


class Module:
    def __init__(self) -> None:
        self._modules: dict[str, Module | None] = {}
        self._parameters: dict[str, Parameter | None] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        if getattr(self, "dtype", None) == "float32":  # a router
            return output
        if isinstance(output, tuple):
            return (activations(output[0]), *output[1:])
        return activations(output)

    def __getattr__(self, name: str) -> Any:
        for store in ("_parameters", "_modules"):
            if name in self.__dict__.get(store, ()):
                return self.__dict__[store][name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # A child keeps its place when it is set anew, so that layers can be swapped while the tree is walked.
        if isinstance(value, Parameter):
            self.__dict__["_parameters"][name] = value
        elif isinstance(value, Module):
            self.__dict__["_modules"][name] = value
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, parameter: Parameter | None) -> None:
        self._parameters[name] = parameter

    def named_modules_with_parent(
        self, prefix: str = "", parent: Module | None = None
    ) -> Iterator[tuple[str, Module, Module | None]]:
        """(name, module, parent), parents first. The children are those of whatever stands there after the visit."""
        yield prefix, self, parent
        module = self if parent is None else getattr(parent, prefix.rsplit(".", 1)[-1])
        if module is None:
            return
        for name, child in module._modules.items():
            if child is not None:
                yield from child.named_modules_with_parent(f"{prefix}.{name}" if prefix else name, module)

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        for name, module, _ in self.named_modules_with_parent():
            yield name, module

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter), each parameter once."""
        seen = set()
        for prefix, module in self.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{prefix}.{name}" if prefix else name, parameter


class ModuleList(Module):
    def __init__(self, modules: Sequence[Module]) -> None:
        super().__init__()
        for index, module in enumerate(modules):
            self._modules[str(index)] = module

    def __getitem__(self, index: int) -> Module:
        return list(self._modules.values())[index]

    def __len__(self) -> int:
        return len(self._modules)
