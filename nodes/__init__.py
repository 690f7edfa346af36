"""The ComfyUI side of the pack. Only relative imports among these modules: ComfyUI owns a module called `nodes`."""
