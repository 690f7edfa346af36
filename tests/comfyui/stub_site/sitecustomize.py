"""Let ComfyUI start without the packages that no test here reaches (put this folder on PYTHONPATH).

ComfyUI imports torchvision, torchaudio, spandrel, kornia and others at start-up, hundreds of megabytes that only its
audio, upscaling and image-processing nodes use. The finder stands last on `sys.meta_path`, so a package that is really
installed is imported as usual; only a name that nothing else finds gets an empty module.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

OPTIONAL_PACKAGES = frozenset({"torchvision", "torchaudio", "spandrel", "kornia"})


class EmptyModule(ModuleType):
    """A package whose every attribute is a class without methods: enough for `from x import Y` and annotations."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class OptionalPackageFinder:
    """Finder and loader of the packages in `OPTIONAL_PACKAGES` and of everything below them."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in OPTIONAL_PACKAGES:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.append(OptionalPackageFinder())
