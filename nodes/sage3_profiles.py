"""The nodes Sage3ProfileSave and Sage3ProfileLoad."""

import hashlib
import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from .profile import CalibrationProfile, ProfileError
from .profile_file import SUFFIX
from .schema_options import search_aliases

Profile = io.Custom("SAGE3_PROFILE")
_MOST_LISTED = 1000
_NONE = "no profiles yet: save one with Sage3 Profile Save"


class Sage3ProfileSave(io.ComfyNode):
    """Writes a profile to ComfyUI's output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="Sage3ProfileSave",  # permanent: saved in workflows
            display_name="Sage3 Profile Save",
            category="model/attention/Sage3",
            description="Saves what Sage3 Calibrate measured, for later and for others with the same model.",
            inputs=[
                Profile.Input("profile"),
                io.String.Input(
                    "filename_prefix",
                    default="sage3/profile",
                    tooltip="Below ComfyUI's output folder; a number is added, so nothing is overwritten.",
                ),
            ],
            outputs=[io.String.Output(display_name="file")],
            is_output_node=True,
            **search_aliases("save calibration"),
        )

    @classmethod
    def execute(cls, profile: CalibrationProfile, filename_prefix: str) -> io.NodeOutput:
        """Write it under the next free number."""
        output = folder_paths.get_output_directory()
        wanted = Path(os.path.abspath(os.path.join(output, filename_prefix)))
        # Core's own check, below, lets links through that lead out of the folder.
        if not filename_prefix.strip() or not _inside(wanted, output):
            raise ValueError(f"filename_prefix must name a file below the output folder, got {filename_prefix!r}")
        folder, name, number, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, output)
        path = Path(folder) / f"{name}_{number:05}_{SUFFIX}"
        profile.save(path)
        return io.NodeOutput(f"{Path(subfolder, path.name).as_posix()} [output]", ui={"text": [str(path)]})


class Sage3ProfileLoad(io.ComfyNode):
    """Reads a profile from ComfyUI's input or output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="Sage3ProfileLoad",  # permanent: saved in workflows
            display_name="Sage3 Profile Load",
            category="model/attention/Sage3",
            description="Loads a profile that Sage3 Profile Save wrote, from ComfyUI's input or output folder.",
            inputs=[
                io.Combo.Input("file", options=list_profiles() or [_NONE]),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Checks that the profile was measured on this model, and says what differs.",
                ),
            ],
            outputs=[Profile.Output(display_name="profile")],
            **search_aliases("load calibration"),
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, model: Any = None) -> str:
        """Read the file again when it has changed."""
        try:
            return hashlib.sha256(profile_path(file).read_bytes()).hexdigest()
        except (ProfileError, OSError) as error:
            return str(error)

    @classmethod
    def execute(cls, file: str, model: Any = None) -> io.NodeOutput:
        """Read it, and check it against the model if there is one."""
        profile = CalibrationProfile.load(profile_path(file))
        if model is not None:
            profile.check(model)
        return io.NodeOutput(profile)


def list_profiles() -> list[str]:
    """Profiles in the input and output folders, as core writes such names: "sub/name [output]"."""
    found = []
    for label, folder in _folders().items():
        for path in sorted(Path(folder).rglob(f"*{SUFFIX}")):
            if _inside(path, folder):
                found.append(f"{path.relative_to(folder).as_posix()} [{label}]")
    return found[:_MOST_LISTED]


def profile_path(name: str) -> Path:
    """The file that a name of list_profiles() means.

    Raises:
        ProfileError: a name that is none, or leads out of the folder.
    """
    for label, folder in _folders().items():
        bare = name.removesuffix(f" [{label}]")
        if bare != name:
            path = Path(os.path.abspath(os.path.join(folder, bare)))
            if not bare.endswith(SUFFIX) or not _inside(path, folder):
                break
            return path
    raise ProfileError(f"{name!r} is no profile in the input or output folder; choose one that is listed")


def _folders() -> dict[str, str]:
    return {"input": folder_paths.get_input_directory(), "output": folder_paths.get_output_directory()}


def _inside(path: Path, folder: str) -> bool:
    real = os.path.realpath(folder)
    return os.path.commonpath([real, os.path.realpath(path)]) == real and os.path.realpath(path) != real
