"""Loading a policy: files -> tokenizer, NF4 base, adapters, and a check that this code computes
this model (see policy/supported.py and policy/check.py).
"""

from collections.abc import Sequence
from pathlib import Path

import bitsandbytes as bnb
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lowmem_grpo.errors import ModelError
from lowmem_grpo.out_of_memory import first_line, is_out_of_memory
from lowmem_grpo.plain_json import parse_json
from lowmem_grpo.policy.adapters import describe_adapters
from lowmem_grpo.policy.attention import ATTENTION
from lowmem_grpo.policy.base import AdapterSettings, Policy, attach_adapters
from lowmem_grpo.policy.check import check_forward, share_inputs
from lowmem_grpo.policy.files import (
    broken_file,
    check_ends,
    check_layers,
    check_tokenizer_config,
    check_tokens,
    check_weights,
    own_tokenizer,
    weight_names,
)
from lowmem_grpo.policy.positions import check_window, fix_frequencies
from lowmem_grpo.policy.quantised import own_names, quantisation
from lowmem_grpo.policy.quantizer import FourBits, four_bits
from lowmem_grpo.policy.source import fetch, resolve
from lowmem_grpo.policy.supported import OWN_ATTENTION, check_config, without_noise
from lowmem_grpo.quiet import quiet_libraries
from lowmem_grpo.text_files import read_text

__all__ = [
    "load_in_4_bits", "load_policy", "load_tokenizer", "nf4_config", "read_tokenizer",
]  # fmt: skip


def nf4_config(dtype: torch.dtype, skip: Sequence[str] = ()) -> FourBits:
    """NF4 with double quantisation; products in `dtype`. `skip`: modules that stay as they are,
    beside those that transformers leaves.
    """
    return FourBits(
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(skip) or None,
    )


def load_policy(
    name: str,
    *,
    device: str,
    dtype: torch.dtype,
    attention: str,
    adapters: AdapterSettings,
    seed: int,
    tile_tokens: int,
    tile_vocab: int,
    chat_template: str | None = None,
    mlp_tile: int = 0,
    cache_bits: int = 16,
    embedding_on_host: bool = False,
    lm_head_bits: int = 16,
    lm_head_kernels: str = "torch",
    window: int | None = None,
) -> Policy:
    """Load tokenizer and NF4 base, attach fresh adapters and check the forward pass. Raises
    ModelError.

    `mlp_tile`: tokens that an MLP computes at a time; 0: all. `cache_bits`: of the sampler's keys
    and values. `lm_head_bits`: 16 is the compute dtype. `lm_head_kernels`: torch or triton.
    `window`: the most tokens of a prompt and its completion together, see policy/positions.py.
    """
    head_kernels = _triton_kernels(device) if lm_head_kernels == "triton" else None
    source = resolve(name)
    tokenizer = load_tokenizer(name, chat_template)
    with quiet_libraries():
        config = _read_config(name, source)
        check_config(name, config)
        check_window(name, config, window)
        without_noise(config)
        said = fix_frequencies(config, window)
        model = load_in_4_bits(AutoModelForCausalLM, name, config, device, dtype, ATTENTION)
        vocab = model.get_output_embeddings().weight.shape[0]
        check_ends(source, name, model.generation_config.eos_token_id, vocab)
        check_tokens(name, tokenizer, vocab)
        peft_model = attach_adapters(model, adapters, seed)
    # Train mode for good: see policy/base.py.
    peft_model.train()
    for module in peft_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    policy = Policy(
        peft_model, tokenizer, attention=attention, tile_tokens=tile_tokens, tile_vocab=tile_vocab
    )
    policy.cache_bits, policy.head_kernels = cache_bits, head_kernels
    policy.said += [*said, *describe_adapters(peft_model, adapters)]
    if embedding_on_host:
        policy.embedding_to_host()
    share_inputs(policy, name)
    check_forward(policy, name)
    policy.set_mlp_tile(mlp_tile)
    if lm_head_bits == 8:
        policy.round_head()
    return policy


def _triton_kernels(device: str):
    if not device.startswith("cuda"):
        raise ModelError(
            f"model.lm_head_kernels = triton needs a CUDA card, this is {device}: use torch"
        )
    try:
        from lowmem_grpo.policy import head_kernels
    except ImportError as error:
        raise ModelError(
            f"model.lm_head_kernels = triton: {error}; pip install triton, or use torch"
        ) from error
    return head_kernels


def load_tokenizer(name: str, chat_template: str | None = None):
    """The model's tokenizer with a chat template (`chat_template`: a file's path) and an end.
    Raises ModelError.
    """
    how = "use an instruct model, or give one with --set model.chat_template=FILE"
    tokenizer = read_tokenizer(name, chat_template, "model.chat_template", how)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: its tokenizer names no end-of-sequence token")
    return tokenizer


def read_tokenizer(name: str, chat_template: str | None, setting: str, way_out: str):
    """The model's tokenizer with its chat template, or that of a file, which `setting` gave.
    Raises ModelError; `way_out`: of having none.
    """
    source = resolve(name)
    check_tokenizer_config(source)
    with quiet_libraries():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # `tokenizers` raises no narrower one for a bad file
            raise ModelError(
                f"cannot load the tokenizer of {name}: {first_line(error)}{broken_file(source)}"
            ) from error
    if code := own_tokenizer(tokenizer.init_kwargs):
        raise ModelError(
            f"{name}: its tokenizer asks for code of its own ({code}), which is never run: use a "
            "model whose tokenizer transformers has"
        )
    if chat_template is not None:
        path = Path(chat_template)
        if not path.is_file():
            raise ModelError(f"{setting}: no such file: {chat_template}")
        try:
            tokenizer.chat_template = _template_in(read_text(path))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ModelError(f"{setting}: cannot read {path}: {reason}") from error
    if not tokenizer.chat_template:
        raise ModelError(f"{name} has no chat template: {way_out}")
    return tokenizer


def _template_in(text: str) -> str:
    """The template of a file, which may be JSON that has it, like a tokenizer_config.json. Raises
    ValueError for other JSON.
    """
    try:
        document = parse_json(text)
    except ValueError:
        return text
    found = document.get("chat_template") if isinstance(document, dict) else None
    if not isinstance(found, str):
        raise ValueError(
            "it is JSON without a text named 'chat_template': give a template in Jinja"
        )
    return found


def _read_config(name: str, source: str):
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the configuration of {name}: {first_line(error)}") from error


def load_in_4_bits(
    kind,
    name: str,
    config,
    device: str,
    dtype: torch.dtype,
    attention: str | None = None,
    skip: Sequence[str] = (),
):
    """The model called `name` as one of transformers' Auto class `kind`, with NF4 layers but for
    those named in `skip`. `attention`: another than transformers would choose. Raises ModelError.
    """
    source = resolve(name)
    if getattr(config, "quantization_config", None) is not None and not Path(source).is_dir():
        source = str(fetch(name))  # whose tensors say which layers are in 4 bits
    try:
        stored = quantisation(name, source, kind, config)
        packed = _take(config, stored)
        model, info = kind.from_pretrained(
            source,
            config=config,
            quantization_config=None if packed else nf4_config(dtype, skip),
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        if error.args == (ATTENTION,):  # looked up in the model's own table of attentions
            reason = f"{name} ({config.model_type}) is not supported: {OWN_ATTENTION}"
            raise ModelError(reason) from error
        reason = first_line(error)
        raise ModelError(f"cannot load {name}: {reason}{broken_file(source)}") from error
    if info["missing_keys"]:
        count, first = len(info["missing_keys"]), min(info["missing_keys"])
        raise ModelError(f"{name}: {count} weights are missing from its files, first {first}")
    check_layers(name, info["unexpected_keys"], model.state_dict())
    own, parameters = own_names(model, weight_names(source)), dict(model.named_parameters())
    packed = {weight for weight, mine in own.items() if mine.removesuffix(".weight") in packed}
    plain = {weight for weight, mine in own.items() if mine in parameters}
    check_weights(source, name, dtype, plain - packed, packed, info["unexpected_keys"])
    if packed:
        _set_dtype(model, dtype)
    return model


def _take(config, stored: dict | None) -> dict:
    """Let a configuration say how the files of its model are quantised; returns the layers in 4
    bits.
    """
    if stored is None:
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # of files whose weights are plain all the same
        return {}
    packed = stored.pop("packed")
    config.quantization_config = four_bits(stored)
    return packed


def _set_dtype(model, dtype):
    """Files that are 4-bit already keep their own dtypes, whatever `from_pretrained` is asked. The
    bytes of weights may be stored as numbers of several bytes, for trainers that shard them; here
    they are bytes.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = dtype
            module.weight.data = module.weight.data.view(torch.uint8).view(-1, 1)
            module.weight.quant_storage = module.quant_storage = torch.uint8
    for parameter in model.parameters():
        if not isinstance(parameter, bnb.nn.Params4bit):
            parameter.data = parameter.data.to(dtype)
