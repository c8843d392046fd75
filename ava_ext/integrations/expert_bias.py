"""DeepSeek-V3's balancing without a loss, for models of transformers whose routers have a correction bias."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ava_ext.integrations.attach import causal_lm_of
from ava_ext.integrations.loss_functions import check_is_loss
from ava_ext.losses.moe import MoEBalancer
from ava_ext.model_config import text_modules
from ava_ext.ops.arguments import check_is_tensor
from ava_ext.ops.committed import is_first_run
from ava_ext.unified_loss import UnifiedLoss

_BIAS = "e_score_correction_bias"


def bind_expert_bias(model: nn.Module, loss_fn: UnifiedLoss) -> ExpertBiasBinding:
    """Lets the loss's expert_bias balance the routers of a model: DeepSeek-V3, GLM-4 MoE and others that have an
    e_score_correction_bias.

    Hooks record what each router chose, for the loss. expert_bias is copied into the routers before every forward, and
    before the state of the model is saved. It starts from the routers' current bias, and does so again after a state
    dict without the loss's state is loaded into the model. With `fuse_lm_head` or `attach_loss` the loss then gets
    gate_logits and expert_indices automatically; in a loop of your own, pass `**binding.take()` to the loss.

    Args:
        model: before it is wrapped.
        loss_fn: with use_moe_balancing=True and as many layers and experts as UnifiedLoss.from_model(model) counts;
            gradient_balance_weight=0.0 for the bias alone.

    Returns:
        The binding; `remove()` takes the hooks away.

    Raises:
        ValueError: a loss without balancing, or for other numbers of layers or experts.
        TypeError: a router that does not return router logits and the experts it chose.

    Example:
        >>> options = {"use_moe_balancing": True, "gradient_balance_weight": 0.0, "auto_step": False}
        >>> loss_fn = UnifiedLoss.from_model(model, **options)
        >>> bind_expert_bias(fuse_lm_head(model, loss_fn), loss_fn)
    """
    check_is_loss("bind_expert_bias", loss_fn)
    check_is_tensor("bind_expert_bias", "model", model, (nn.Module,), "a torch.nn.Module")
    inner = causal_lm_of(model)
    holders = [module for module in text_modules(inner) if isinstance(getattr(module, _BIAS, None), Tensor)]
    balancer = getattr(loss_fn, MoEBalancer.name)
    if balancer is None:
        raise ValueError("bind_expert_bias: expected a loss with use_moe_balancing=True, got False")
    shapes = [(*getattr(holder, _BIAS).shape,) for holder in holders]
    sizes = [shape[1:] if shape[:1] == (1,) else shape for shape in shapes]  # [1, n_experts]: Ernie 4.5
    if sizes != [(balancer.n_experts,)] * balancer.n_layers:
        raise ValueError(
            f"bind_expert_bias: expected num_moe_layers = {balancer.n_layers} routers with {_BIAS} of shape "
            f"[{balancer.n_experts}], got {len(holders)} of shapes {sorted(set(shapes))}"
        )
    parents = {child: module for module in inner.modules() for child in module.children()}
    routers = [_router_of(holder, parents[holder]) for holder in holders]
    inner.expert_bias_binding = binding = ExpertBiasBinding(inner, holders, routers, balancer)
    return binding


def _router_of(holder: nn.Module, parent: nn.Module) -> nn.Module:
    """What chooses by a bias: its holder, the gate in that (MiniMax-M2), or the module around it (Ernie 4.5)."""
    for name in ("gate", "router"):
        child = getattr(holder, name, None)
        if isinstance(child, nn.Module) and not isinstance(child, nn.Linear):
            return child
    return holder if hasattr(holder, "weight") or list(holder.children()) else parent


class ExpertBiasBinding:
    """What `bind_expert_bias` returns."""

    def __init__(self, model: Any, holders: list[nn.Module], routers: list[nn.Module], balancer: MoEBalancer) -> None:
        self.model = model
        self.holders = holders  # of the bias, one for each router
        self.routers = routers
        self.balancer = balancer
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}
        self._loads_loss = False
        self._take_bias()
        self._hooks = [
            router.register_forward_hook(functools.partial(self._record, layer)) for layer, router in enumerate(routers)
        ]
        self._hooks += [
            model.register_forward_pre_hook(self._before_forward),
            model.register_state_dict_pre_hook(self._before_state_dict),
            model.register_load_state_dict_pre_hook(self._before_load),
            model.register_load_state_dict_post_hook(self._after_load),
        ]

    def take(self) -> dict[str, list[Tensor]]:
        """gate_logits and expert_indices of the last forward, one [n_rows, ...] per layer; as arguments of the loss."""
        if len(self._chosen) != len(self.routers):
            raise ValueError(
                f"bind_expert_bias: expected a forward through {len(self.routers)} routers before the loss, got "
                f"{len(self._chosen)}"
            )
        chosen = [self._chosen[layer] for layer in range(len(self.routers))]
        self._chosen = {}
        return {"gate_logits": [logits for logits, _ in chosen], "expert_indices": [indices for _, indices in chosen]}

    @torch.no_grad()
    def copy_bias(self) -> None:
        """Copies expert_bias into the routers."""
        for layer, holder in enumerate(self.holders):
            getattr(holder, _BIAS).copy_(self.balancer.expert_bias[layer])

    @torch.no_grad()
    def _take_bias(self) -> None:
        for layer, holder in enumerate(self.holders):
            for own in (self.balancer.expert_bias, self.balancer.previous_expert_bias):
                own[layer].copy_(getattr(holder, _BIAS).view(-1))

    def remove(self) -> None:
        """Takes the hooks away; the routers keep the bias that they have."""
        for hook in self._hooks:
            hook.remove()
        self.model.expert_bias_binding = None

    def _before_forward(self, model: nn.Module, arguments: Any) -> None:
        self._chosen = {}
        self.copy_bias()

    def _before_state_dict(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.copy_bias()

    def _before_load(self, model: nn.Module, state_dict: dict[str, Any], *arguments: Any) -> None:
        self.copy_bias()  # for routers that are not in what is loaded
        self._loads_loss = any(name.endswith(f"{MoEBalancer.name}.expert_bias") for name in state_dict)

    def _after_load(self, model: nn.Module, keys: Any) -> None:
        if not self._loads_loss:  # a model saved without the loss brings the bias of its routers
            self._take_bias()

    def _record(self, layer: int, router: nn.Module, arguments: Any, output: Any) -> None:
        tensors = [value for value in output if isinstance(value, Tensor)] if isinstance(output, tuple) else []
        indices = [value for value in tensors if not value.is_floating_point()]
        logits = [
            value for value in tensors if value.is_floating_point() and value.shape[-1] == self.balancer.n_experts
        ]
        if len(indices) != 1 or not logits:
            raise TypeError(
                f"bind_expert_bias: expected {type(router).__name__} to return router logits [n_rows, "
                f"{self.balancer.n_experts}] and the experts it chose, got "
                f"{[list(value.shape) for value in tensors] or type(output).__name__}"
            )
        if is_first_run(indices[0]) is not False:  # checkpointing runs a layer again inside the backward
            self._chosen[layer] = (logits[0], indices[0])
