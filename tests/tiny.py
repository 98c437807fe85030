"""Tiny random models with a tokenizer, written as any model directory is: config, safetensors,
tokenizer.
"""

from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
SPECIAL = ["<e>", "<s>", "<u>", "<a>"]
# bitsandbytes quantises blocks of 64 values; two key-value heads for four query heads.
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}

# The file's names for transformers' tensors.
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, and a chat template; padding is the end token, as is
    common.
    """
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate(SPECIAL + characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<e>",
        pad_token="<e>",
        additional_special_tokens=SPECIAL[1:],
    )
    fast.chat_template = TEMPLATE
    return fast


def make_tiny_model(
    directory: Path, architecture: str = "llama", *, seed: int = 0, **overrides
) -> Path:
    """Write a random model of a transformers architecture (llama, qwen2, qwen3, mistral, ...) and
    return its directory.
    """
    return _write(AutoModelForCausalLM, directory, architecture, seed, overrides)


def make_tiny_reward_model(
    directory: Path, architecture: str = "llama", *, seed: int = 0, **overrides
) -> Path:
    """The same for a random sequence classifier, of one label unless `num_labels` says otherwise;
    its padding is the end token.
    """
    kind = AutoModelForSequenceClassification
    more = {"tie_word_embeddings": False, "num_labels": 1, **overrides}
    return _write(kind, directory, architecture, seed, more)


def _write(kind, directory: Path, architecture: str, seed: int, overrides: dict) -> Path:
    config = AutoConfig.for_model(architecture, **{**SHAPE, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            # The usual initialisation makes next tokens all but uniform; these have something to
            # say.
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return Path(directory)


def make_4_bit_directory(plain: Path, directory: Path, skip: list[str]) -> Path:
    """Write the model of `plain` in bitsandbytes' 4 bits, as uploads are, but for the modules named
    in `skip`; returns its directory.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip
    )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config)
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return Path(directory)


def write_gguf(directory: Path, path: Path) -> Path:
    """Write a tiny Qwen2 as one GGUF file, with a tokenizer of single characters; returns it."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    config, tensors = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    characters = [chr(code) for code in range(33, 127)]
    tokens = ["<e>", *characters, "ab"]
    tokens += [f"<{i}>" for i in range(128 - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 127)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", tensors["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                tensor = tensors.get(f"model.layers.{layer}.{ours}.{kind}")
                if tensor is not None:
                    writer.add_tensor(f"blk.{layer}.{theirs}.{kind}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
