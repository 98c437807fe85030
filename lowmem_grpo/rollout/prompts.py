"""Messages -> the text of a prompt, by the model's chat template, up to where a completion begins.

A prompt that ends in a message of the assistant is continued: the header that the template writes
before a message of the assistant, and then that message as it stands. transformers'
`continue_final_message` does that for templates that leave a message as it is. Many change it: they
trim it, cut thoughts out of it, put empty ones before it. So the header is looked for with another
message, and compared with the beginning that the template writes for a completion: this may open
thoughts ("<think>"), which stay where the message closes them, and where they are empty.
"""

from __future__ import annotations

import re
from typing import Any

from lowmem_grpo.chat_template import TemplateTimeout, apply_chat_template
from lowmem_grpo.errors import ModelError, TaskError
from lowmem_grpo.tasks.messages import split_prefilled
from lowmem_grpo.text_files import half_character

__all__ = ["opening", "render", "turn_added"]

WAY_OUT = "give another with --set model.chat_template=FILE"
COMMON_ROLES = ("system", "user", "assistant")
Messages = list[dict[str, Any]]
# Characters of a private use area, which no template looks for.
_QUESTION, _REPLY = "\ue0a1\ue0a2\ue0a3", "\ue0b1\ue0b2\ue0b3"
_TAG = re.compile(r"<(\w[\w-]*)>")
_CLOSED = re.compile(r"<(\w[\w-]*)>\s*</\1>\s*")


def render(tokenizer, messages: Messages, kwargs: dict[str, Any], problem: str) -> str:
    """The prompt of the problem with that id, which ends where its completion begins. `kwargs`:
    what the template is given beside the messages.

    Raises ModelError for a template that fails, leaves a message out, or does not know its role;
    TaskError for a message that is in a template already.
    """
    before, beginning = split_prefilled(messages)
    for role in {message["role"] for message in before}.difference(COMMON_ROLES):
        if role not in _source(tokenizer):
            raise ModelError(
                f"the chat template does not know the role {role!r:.40} of problem {problem}: "
                f"use {', '.join(COMMON_ROLES)}, or {WAY_OUT}"
            )
    asked = before
    text, before = _with_all(tokenizer, before, kwargs, problem)
    _check_bare(tokenizer, asked, problem, text)
    text += _lacking(tokenizer, before, kwargs, text)
    if beginning:
        text = _continued(tokenizer, before, beginning, kwargs, problem, text)
    if half := half_character(text):
        raise ModelError(
            f"the chat template writes {half} into problem {problem}, half of a surrogate pair and "
            f"no character: {WAY_OUT}"
        )
    return text


def opening(tokenizer, messages: Messages, kwargs: dict[str, Any], problem: str) -> str:
    """The end of that prompt which comes behind the header of the assistant's turn: thoughts that
    the template opens, a beginning of the assistant's. A block that the template opens and closes
    itself, as Qwen 3 does where thinking is off, is left out. Raises ModelError as `render` does.
    """
    before, beginning = split_prefilled(messages)
    text, before = _with_all(tokenizer, before, kwargs, problem)
    text += _lacking(tokenizer, before, kwargs, text)
    header = _header(tokenizer, before, kwargs, text)
    if header is None:
        return beginning
    whole = render(tokenizer, messages, kwargs, problem) if beginning else text
    found = _CLOSED.sub("", whole[len(header) :] if whole.startswith(header) else "")
    return found if found.strip() else ""


def turn_added(tokenizer, messages: Messages, kwargs: dict[str, Any], problem: str) -> str:
    """What is put behind the prompt because the template has no beginning of the assistant's turn
    for a completion, though it has one before a message: mostly nothing. Raises ModelError.
    """
    before, _ = split_prefilled(messages)
    text, before = _with_all(tokenizer, before, kwargs, problem)
    return _lacking(tokenizer, before, kwargs, text)


def _lacking(tokenizer, before: Messages, kwargs: dict[str, Any], text: str) -> str:
    if "add_generation_prompt" in _source(tokenizer):
        return ""
    header = _header(tokenizer, before, kwargs, text) or ""
    added = header.removeprefix(text) if header.startswith(text) else ""
    return added if added.strip() else ""


def _check_bare(tokenizer, messages: Messages, problem: str, text: str) -> None:
    """Raises TaskError for a message that begins as the template begins one, or with a special
    token, unless the template puts nothing before it.
    """
    for content in filter(None, (message["content"].strip() for message in messages)):
        before, found, _ = text.partition(content)
        if not found or not before.strip():
            continue
        marks = [before.rstrip().rpartition("\n")[2]]
        if content[0] in "<[|":
            marks += tokenizer.all_special_tokens
        for mark in marks:
            if len(mark) > 2 and content.startswith(mark):
                raise TaskError(
                    f"problem {problem} is in a chat template already, since a message begins with "
                    f"{mark!r:.40}, and would be put into one again: give the text alone, or "
                    "a template that writes it as it is with --set model.chat_template=FILE"
                )


def _with_all(
    tokenizer, messages: Messages, kwargs: dict[str, Any], problem: str
) -> tuple[str, Messages]:
    """The text, which has every message in it, and the messages in the form that makes it so."""
    text = _rendered(tokenizer, messages, kwargs, problem)
    missing = _left_out(tokenizer, messages, kwargs, problem, text)
    if missing is None:
        return text, messages
    # Templates of models that see pictures, too, may take content as parts alone.
    parts = [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]
    try:
        text = _rendered(tokenizer, parts, kwargs, problem)
    except ModelError:
        text = ""
    if all(message["content"].strip() in text for message in messages) and text:
        return text, parts
    what = "the question" if missing == len(messages) - 1 else f"message {missing + 1}"
    raise ModelError(f"the chat template leaves out {what} of problem {problem}: {WAY_OUT}")


def _left_out(
    tokenizer, messages: Messages, kwargs: dict[str, Any], problem: str, text: str
) -> int | None:
    """The number of a message whose content makes no difference to `text`."""
    for number, message in enumerate(messages):
        # Templates may show a call of a tool without the words that come with it.
        if message["content"].strip() in text or message.get("tool_calls"):
            continue
        other = [*messages]
        other[number] = {**message, "content": message["content"] + " and more"}
        if _rendered(tokenizer, other, kwargs, problem) == text:
            return number
    return None


def _continued(
    tokenizer, before: Messages, beginning: str, kwargs: dict[str, Any], problem: str, text: str
) -> str:
    """`text`, the prompt of the messages `before`, with the beginning of the assistant's turn."""
    header = _header(tokenizer, before, kwargs, text)
    if header is None:
        raise ModelError(
            f"problem {problem} ends with a beginning of the assistant's ({beginning!r:.60}), and "
            "the chat template begins messages of the assistant in another way than completions: "
            f"leave the beginning out, or {WAY_OUT}"
        )
    opened = text[len(header) :].strip()
    if not opened:  # of a Mistral's two headers the longer: it has the space before a message
        return max(text, header, key=len) + beginning
    tags = _TAG.findall(opened)
    begins_anew = beginning.lstrip().startswith(f"<{tags[0]}>" if tags else opened)
    closes = [tag for tag in tags if f"</{tag}>" in opened or f"</{tag}>" in beginning]
    return (text if closes and not begins_anew else header) + beginning


def _header(tokenizer, before: Messages, kwargs: dict[str, Any], text: str) -> str | None:
    """What comes before a message of the assistant that follows the messages `before`."""
    parts = not isinstance(before[0]["content"], str)
    # With a question behind the reply: templates write empty thoughts before the last one.
    for behind in ([("user", _QUESTION)], []):
        more = [
            {"role": role, "content": [{"type": "text", "text": content}] if parts else content}
            for role, content in [("assistant", _REPLY), *behind]
        ]
        try:
            whole = apply_chat_template(tokenizer, [*before, *more], **kwargs)
        except TemplateTimeout:
            raise
        except Exception:  # a template is a program, which can raise anything; this one's the chat
            continue
        header, found, _ = whole.partition(_REPLY)
        if found and (text.startswith(header) or header.startswith(text)):
            return header
    return None


def _rendered(
    tokenizer,
    messages: Messages,
    kwargs: dict[str, Any],
    problem: str,
) -> str:
    try:
        return apply_chat_template(tokenizer, messages, add_generation_prompt=True, **kwargs)
    except Exception as error:  # a template is a program, which can raise anything
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ModelError(
            f"the chat template fails on problem {problem}: {type(error).__name__}: {reason:.200}; "
            f"{WAY_OUT}"
        ) from error


def _source(tokenizer) -> str:
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template
