"""The backend "salad" as `torch.compile` finds it, which is the first to need Dynamo: with this comes Inductor too."""

from salad_compile.backend.announcements import announce_disabled
from salad_compile.backend.compile_ends import when_frames_end
from salad_compile.backend.dynamo import salad

__all__ = ["salad"]

when_frames_end(salad, announce_disabled)
