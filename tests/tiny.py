"""Tiny random models with a tokenizer, written as any model directory is: config, safetensors,
tokenizer.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
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
