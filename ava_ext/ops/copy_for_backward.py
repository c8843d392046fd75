"""A copy that torch.compile saves for backward instead of computing it again."""

from __future__ import annotations

import torch
from torch import Tensor

# torch.compile saves what backward needs or computes it again from its inputs. Where an input is a buffer that the same
# call updates, that would be the updated value: silently another gradient. An operator it does not know is saved.
_LIBRARY = torch.library.Library("ava_ext", "FRAGMENT")
_LIBRARY.define("copy_for_backward(Tensor value) -> Tensor")
_LIBRARY.impl("copy_for_backward", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake("ava_ext::copy_for_backward", torch.empty_like)


def copy_for_backward(
    value: Tensor,  # [...]
) -> Tensor:  # [...]
    """A copy without grad that a backward may keep, also when `value` or what it was computed from changes in place."""
    return torch.ops.ava_ext.copy_for_backward(value.detach())
