"""What others need to use an adapter: the name of its base, and a program that loads both.

A base that is a file of this machine has no name that others can load. Then it is said, and the
person who exports can give one.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_grpo.policy.adapter_files import DEMO_HOME
from lowmem_grpo.policy.source import DEMO, read_object, resolve

__all__ = ["SharedBase", "loading_snippet", "shared_base"]

_WAY_OUT = "name the base's home on the Hub with --base-model OWNER/NAME, for others to load it"
_OLD_KEY = "general.source.huggingface.repository"
_HUB = re.compile(r"(?:https://(?:huggingface\.co|hf\.co)/)?([\w.-]+/[\w.-]+)/?")
_SNIPPET = """\
```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{imported}

base, adapter = {base!r}, {adapter!r}
tokenizer = AutoTokenizer.from_pretrained(adapter)
{quantised}model = AutoModelForCausalLM.from_pretrained(
    base, {how}dtype={dtype}, device_map="auto"
)
model = PeftModel.from_pretrained(model, adapter)

messages = {messages}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{template}
)
tokens = model.generate(**inputs.to(model.device), max_new_tokens={most})
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
_NF4 = """\
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype={dtype},
)
"""


@dataclass(frozen=True)
class SharedBase:
    """`name`: what an adapter's configuration names as its base; `loadable`: what transformers
    loads it from, which is another where the base is a file; `remark`: what others have to know;
    `way_out`: what the person who exports can do about it.
    """

    name: str
    loadable: str
    remark: str | None = None
    way_out: str | None = None

    @property
    def is_public(self) -> bool:
        """Whether the name is one of the Hub."""
        return self.name.count("/") == 1 and not Path(self.name).exists()


def shared_base(name: str, given: str | None = None) -> SharedBase:
    """The base of a run whose model is called `name`, for others; `given`: the name that a person
    has given it.
    """
    if given is not None:
        return SharedBase(given, given)
    if name == DEMO:
        return SharedBase(
            DEMO_HOME,
            DEMO_HOME,
            f"its base is named as {DEMO_HOME}; it was trained on that model's Q4_1 weights",
        )
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if home := home_of(path):
            said = f"its base is named as {home}, as {path.name} says of itself"
            return SharedBase(home, home, said)
        return SharedBase(
            str(path.resolve()),
            f"the directory that `lowmem-grpo model fetch {path.name}` prints",
            f"its base is the file {path.name}, which PEFT cannot load",
            _WAY_OUT,
        )
    if path.is_dir():
        if home := _home_in_cache(path):
            return SharedBase(home, home)
        said = f"its base is the directory {path} of the machine that it was trained on"
        return SharedBase(str(path.resolve()), str(path.resolve()), said, _WAY_OUT)
    return SharedBase(name, name)


def loading_snippet(config, base: SharedBase, adapter: str, dtype: str) -> str:
    """A Python program in Markdown that loads the base as it was trained on, and an adapter in the
    directory `adapter`. `dtype`: of products, as torch calls it.
    """
    own, dtype = _is_quantised(config.model.name), f"torch.{dtype}"
    system, template = config.task.system_prompt, config.model.chat_template_kwargs
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return _SNIPPET.format(
        imported="" if own else ", BitsAndBytesConfig",
        base=base.loadable,
        adapter=adapter,
        quantised="" if own else _NF4.format(dtype=dtype),
        how="" if own else "quantization_config=nf4, ",
        dtype=dtype,
        messages=messages,
        template="".join(f", {key}={value!r}" for key, value in template.items()),
        most=config.rollout.max_completion_length,
    )


def _is_quantised(name: str) -> bool:
    """Whether the model's own files are in 4 bits."""
    fields: dict[str, Any] = {}
    directory = Path(resolve(name))
    if directory.is_dir():
        fields = read_object(directory / "config.json")
    return "quantization_config" in fields


def home_of(path: Path) -> str | None:
    """The Hub id that a GGUF file names as where its weights are from, or None. Not what it names
    as its base model: that is what its model was tuned from.
    """
    from gguf import GGUFReader, Keys

    reader = GGUFReader(path)
    for key in (Keys.General.SOURCE_REPO_URL, Keys.General.SOURCE_URL, _OLD_KEY):
        field = reader.get_field(key)
        found = _HUB.fullmatch(str(field.contents())) if field is not None else None
        if found:
            return found[1]
    return None


def _home_in_cache(path: Path) -> str | None:
    """The Hub id of a directory of the Hub's cache, or None."""
    for part in path.resolve().parts:
        if part.startswith("models--") and part.count("--") >= 2:
            _, owner, name = part.split("--", 2)
            return f"{owner}/{name}"
    return None
