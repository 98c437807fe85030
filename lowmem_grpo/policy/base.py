"""The policy: one NF4 base with LoRA adapters, in every role that GRPO needs.

There is one copy of the weights. Which role it plays is a matter of the adapters:

    role                 method                          adapters  gradients
    reference            `with policy.as_reference():`   off (*)   no
    old policy, sampler  `with policy.as_sampler():`     on        no
    trainable policy     `with policy.as_trainable():`   on        yes

(*) or, after `keep_reference`, a copy of them as they were when `sync_reference` was last called.

Outside every `with` the policy is trainable. A role ends with its block, also when the block
raises.

Linear layers are NF4 with double quantisation (Dettmers et al., arXiv 2305.14314); embedding, norms
and head stay in the compute dtype (but see ends.py); adapters are float32. Norms and MLPs are
replaced by our own, which compute the same and hold less (norm.py, mlp.py). The model is never put
in eval mode: on a CPU with AVX512-BF16, bitsandbytes repacks a 4-bit weight in place at its first
eval forward, into a format without a backward pass, and gradients would silently stop there.
Dropout, the other thing that train mode means, is set to zero.

`hidden`, then `score`, is the whole forward pass: trunk over packed tokens, then the tiled head
over those rows alone whose next token counts.
"""

import contextlib
import copy
from pathlib import Path

import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy.activations import (
    HostBuffers,
    checkpointed_layers,
    held_by_autograd,
    kept_on_host,
    set_checkpointing,
)
from lowmem_grpo.policy.adapters import AdapterSettings, attach_adapters
from lowmem_grpo.policy.attention import PackedLayout
from lowmem_grpo.policy.divergence import token_divergence
from lowmem_grpo.policy.ends import HostTable, RoundedHead, embedding_to_host, round_head
from lowmem_grpo.policy.logprobs import full_logits, token_logprobs
from lowmem_grpo.policy.lora import ADAPTER, LoraLinear4bit
from lowmem_grpo.policy.mlp import tile_mlps
from lowmem_grpo.policy.reference import KeptReference
from lowmem_grpo.policy.sampling_layers import last_hidden, sampling_layers
from lowmem_grpo.policy.shared_input import SharedInput, few, find

__all__ = ["AdapterSettings", "Policy", "attach_adapters"]


class Policy:
    """See the module's docstring. Build one with `lowmem_grpo.policy.load.load_policy`."""

    def __init__(self, model, tokenizer, *, attention: str, tile_tokens: int, tile_vocab: int):
        """`model`: a PeftModel over a transformers causal LM whose attention is `ATTENTION`.

        What may be set later: `cache_bits` of the sampler's keys and values, 16 or 8;
        `head_kernels`, which make the passes over the head's tiles, None for torch;
        `sampling_layers`, None for sampling through the model's modules.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.attention = attention
        self.tiles = {"tile_tokens": tile_tokens, "tile_vocab": tile_vocab}
        self.buffers = HostBuffers()
        self.cache_bits = 16
        self.head_kernels = None
        self.said: list[str] = []  # choices that were made while loading, a line each
        self._offloading = self._overlapping = False
        self._shared: list[SharedInput] = []
        self._kept: KeptReference | None = None
        self._sampling = False
        self.sampling_layers = None
        self.causal_lm = model.get_base_model()
        self._layers = checkpointed_layers(self.causal_lm)
        self._mlps = tile_mlps(self.causal_lm)
        self.trunk = self.causal_lm.base_model
        head = self.causal_lm.get_output_embeddings()
        self.head_weight_VD, self.head_bias_V = head.weight, getattr(head, "bias", None)
        self.dtype = self.head_weight_VD.dtype
        self.device = self.head_weight_VD.device

    # --- Roles

    @contextlib.contextmanager
    def as_reference(self):
        """Adapters off, no gradients: the base; or with the adapters that were kept."""
        if self._kept is not None:
            self._kept.refer(True)
            try:
                with torch.no_grad():
                    yield
            finally:
                self._kept.refer(False)
            return
        self.model.base_model.disable_adapter_layers()
        try:
            with torch.no_grad():
                yield
        finally:
            # Also turns the adapters' requires_grad back on, which disabling had cleared.
            self.model.base_model.enable_adapter_layers()

    @contextlib.contextmanager
    def as_sampler(self):
        """Adapters on, no gradients: the policy as it is now. They must not change within."""
        for shared in self._shared:
            for layer in shared.layers:
                layer.sampling = shared
        self._sampling = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._sampling = False
            for shared in self._shared:
                shared.forget()
                for layer in shared.layers:
                    layer.sampling = None

    def share_inputs(self, forward) -> None:
        """Let layers that are given the same tensor sample together; `forward()` shows which."""
        self._shared = find(self._adapted(), forward)
        self.sampling_layers = sampling_layers(self.causal_lm, self._shared)

    def _adapted(self) -> list[LoraLinear4bit]:
        return [m for m in self.model.modules() if isinstance(m, LoraLinear4bit)]

    def keep_reference(self) -> None:
        """From here on the reference is the base with a copy of the adapters, which is made now."""
        self._kept = KeptReference(self.model, self.dtype)

    def sync_reference(self) -> None:
        """Move a kept reference to the policy as it is now."""
        if self._kept is not None:
            self._kept.sync()

    def reference_state(self) -> dict[str, torch.Tensor]:
        """The kept reference's adapters by name, copies on the CPU; nothing where none is kept."""
        kept = {} if self._kept is None else self._kept.tensors()
        return {name: tensor.to("cpu", copy=True) for name, tensor in kept.items()}

    def load_reference_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put a saved reference in the place of the kept one. Raises ModelError where it does not
        fit.
        """
        self._kept.load(state)

    def tensors_beside(self) -> list[tuple[str, torch.Tensor]]:
        """What is kept on the device beside the model, by name: the sampler's, a head in 8 bits."""
        found = [named for shared in self._shared for named in shared.tensors()]
        if isinstance(self.head_weight_VD, RoundedHead):
            found += self.head_weight_VD.tensors()
        return found

    @contextlib.contextmanager
    def as_trainable(
        self, *, checkpointing: bool = False, offloading: bool = False, overlapping: bool = False
    ):
        """Adapters on, gradients recorded; with `checkpointing`, layers are computed again in
        backward, with `offloading` what that takes lies in host memory, and with `overlapping` it
        goes there and back beside the layers' kernels.
        """
        set_checkpointing(self.causal_lm, checkpointing)
        self._offloading, self._overlapping = offloading, overlapping
        try:
            with torch.enable_grad():
                yield
        finally:
            set_checkpointing(self.causal_lm, False)
            self._offloading = self._overlapping = False

    # --- What it takes

    def set_mlp_tile(self, tokens: int) -> None:
        """Tokens that an MLP computes at a time; 0: all."""
        for mlp in self._mlps:
            mlp.tile = tokens or None

    def embedding_to_host(self, table: type = HostTable) -> None:
        """Move the input embedding to the host. Raises ModelError where it is the head as well."""
        embedding_to_host(self.causal_lm, table)

    def round_head(self) -> None:
        """Go on with the head in 8 bits. Raises ModelError where it is the embedding as well."""
        self.head_weight_VD = round_head(self.causal_lm)

    def release(self) -> None:
        """Give memory that is cached and not in use back to the card. To be called between phases:
        what one leaves in pieces has the wrong sizes for the next, and what was fetched for a
        backward pass that ran out of memory is of no use any more.
        """
        self.buffers.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- Forward

    def layout(self, groups) -> PackedLayout:
        """Attention layout of packed groups ((prompt tokens, (completion tokens, ...)), ...) for
        this policy.
        """
        return PackedLayout(tuple(groups), self.attention, self.device)

    def hidden(self, input_ids_T, positions_T, layout) -> torch.Tensor:
        """Last hidden states [T, D] of packed tokens; ids and positions are int64 [T] on the
        policy's device.
        """
        embedded, keeping = self.trunk.get_input_embeddings()(input_ids_T[None]), None
        if self._sampling and self.sampling_layers and few(embedded):
            return last_hidden(
                self.causal_lm, self.sampling_layers, embedded[0], positions_T, layout
            )
        if self._offloading:
            embedded = held_by_autograd(embedded)
            keeping = kept_on_host(self.buffers, self._overlapping, self._layers)
        with keeping or contextlib.nullcontext():
            return self.trunk(
                inputs_embeds=embedded,
                position_ids=positions_T[None],
                use_cache=False,
                layout=layout,
                **self._of_layers(input_ids_T),
            ).last_hidden_state[0]

    def _of_layers(self, input_ids_T) -> dict[str, torch.Tensor]:
        """What each layer gets of a token beside its embedding, in models that have that (Gemma 4).
        transformers would look for the token whose embedding it is.
        """
        if not getattr(self.causal_lm.config, "hidden_size_per_layer_input", 0):
            return {}
        return {"per_layer_inputs": self.trunk.get_per_layer_inputs(input_ids_T[None])}

    def logits(self, hidden_ND) -> torch.Tensor:
        """Full logits [N, V] in float32, for sampling: N is a handful of last positions."""
        return full_logits(
            hidden_ND, self.head_weight_VD, self.head_bias_V, self.tiles["tile_vocab"]
        )

    def score(self, hidden_ND, targets_N, **options):
        """Log-probabilities and entropies [N] of target tokens, by tiles; `options`: see
        `token_logprobs`.
        """
        return token_logprobs(
            hidden_ND,
            self.head_weight_VD,
            targets_N,
            bias_V=self.head_bias_V,
            kernels=self.head_kernels,
            **options,
            **self.tiles,
        )

    def divergence(self, hidden_ND, reference_ND, **options) -> torch.Tensor:
        """KL(policy || reference) [N] over the whole vocabulary, by tiles; `options`: see
        `token_divergence`.
        """
        head = self.head_weight_VD
        return token_divergence(
            hidden_ND, reference_ND, head, bias_V=self.head_bias_V, **options, **self.tiles
        )

    # --- Adapters

    def adapter_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Every trainable parameter by name: A and B of each adapted layer, float32."""
        # Those of an embedding are no layers: their names end with the adapter's.
        return {
            n: p
            for n, p in self.model.named_parameters()
            if "lora_" in n and f".{ADAPTER}." in f"{n}."
        }

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Copies of the adapters under PEFT's file names, as contiguous CPU tensors."""
        state = self._named_adapters()
        return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in state.items()}

    def load_adapter_state(self, state: dict[str, torch.Tensor]) -> None:
        """Put saved adapters in place. Raises ModelError where they do not fit this model."""
        own = self._named_adapters()
        state = self._in_these_names(state, own)
        if own.keys() != state.keys():
            missing, more = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
            raise ModelError(
                f"the adapter does not fit this model: {len(missing) + len(more)} tensors differ, "
                f"first {(missing or more)[0]}, which {'it lacks' if missing else 'is no layer'}"
            )
        for name, tensor in state.items():
            if own[name].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
                raise ModelError(f"the adapter does not fit this model: {name} is {shapes}")
        set_peft_model_state_dict(self.model, state, adapter_name=ADAPTER)

    def _in_these_names(self, state, own) -> dict[str, torch.Tensor]:
        """An adapter's tensors without copies of the base's that it brings along (an embedding's),
        and with those of experts as this version of transformers holds them.
        """
        base = {
            n.replace(".base_layer.", "."): p
            for n, p in self.causal_lm.named_parameters()
            if p.is_floating_point() and "lora_" not in n
        }
        kept = {}
        for name, tensor in state.items():
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            copied = base.get(plain) if "lora_" not in name else None
            if copied is None or copied.shape != tensor.shape:
                kept[name] = tensor
            elif not torch.equal(copied.cpu(), tensor.to(copied.dtype)):
                raise ModelError(
                    f"the adapter brings {name}, which is not the base's: merge it into its base, "
                    "and train on that"
                )
        if kept.keys() == own.keys():
            return kept
        try:
            return convert_peft_adapter_state_dict_for_transformers(
                self.causal_lm, self.model.peft_config[ADAPTER], kept, ADAPTER
            )
        except (KeyError, RuntimeError, ValueError):
            return kept

    def _named_adapters(self) -> dict[str, torch.Tensor]:
        # Without the embedding that an adapter is on, which PEFT would write beside it.
        return get_peft_model_state_dict(
            self.model, adapter_name=ADAPTER, save_embedding_layers=False
        )

    def save_adapter_config(self, directory: Path, base_name: str) -> None:
        """Write PEFT's `adapter_config.json`, naming `base_name` as the base model."""
        config = copy.copy(self.model.peft_config[ADAPTER])
        config.base_model_name_or_path = base_name
        config.inference_mode = True
        # A set, whose order is another in each process, unless it is a pattern.
        for name in ("target_modules", "target_parameters"):
            if isinstance(names := getattr(config, name), (set, list)):
                setattr(config, name, sorted(names))
        config.save_pretrained(str(directory))
