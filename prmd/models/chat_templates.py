"""Chat templates: what one writes around a turn, and how a conversation is rendered by it.

What a template does is found once from conversations rendered by it, by content and position, not by names of tokens
(`read_template`). Text of a message never becomes a control token: where it spells one, that span is cut into ordinary
tokens; all other text gives the ids of `apply_chat_template`. A template that writes today's date writes a fixed one.
Rows of prompts and responses are made in `tokenization`.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import pairwise

from jinja2 import Environment
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from prmd.errors import ConfigError, DataError, first_line
from prmd.pairs import Message

SYSTEM, QUESTION, ANSWER, NEXT = "Sysprobe", "Askprobe", "Replyprobe", "Nextprobe"
"""Contents of the conversations by which a template is read: words that no template writes itself."""

FIXED_DATE = datetime(2024, 7, 26)
"""Today, for a template that asks: the date that Llama's own templates write where they know none."""

THINKING_NAMES = ("enable_thinking", "thinking")
"""Variables by which templates switch thoughts on and off."""

MARKS = tuple(chr(0xE000 + i) for i in range(16))
"""Private characters that stand inside a spelled control token while the tokenizer reads it, and are dropped again."""

_THOUGHT = re.compile(r"</?think(?:ing)?>")
_PIPED = re.compile(r"<[|｜].*>|<.*[|｜]>")
_TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Za-z_]+\]")
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1""")
_SWITCH = re.compile(r"\A(?:\{%- set (?:enable_)?thinking = (?:true|false) %\}\n)+")
_THINKS = "{%- set enable_thinking = true %}"


@dataclass(frozen=True)
class ChatTemplate:
    """What the template of a tokenizer does.

    Attributes:
        source: the template as it is rendered.
        controls: finds the first character of every control token that a text spells; None where there are none.
        control_ids: ids of the tokens that structure a conversation.
        stop: the token that ends an assistant's turn; None: none does.
        closing: what stands behind the answer that ends a conversation, from `stop` on; without `stop` where the template
            writes it between turns alone.
        takes_system: whether it writes a system turn; else the turn is folded into the first user's.
        thinks: whether thoughts are switched on, so that an answer may hold them.
        folder: for messages.
    """

    source: str
    controls: re.Pattern[str] | None
    control_ids: frozenset[int]
    stop: int | None
    closing: tuple[int, ...]
    takes_system: bool
    thinks: bool
    folder: str

    @property
    def writes_stop(self) -> bool:
        """Whether the last turn of a conversation is closed as those before it."""
        return self.closing[:1] == (self.stop,)


# ------------------------------------------------------------------ reading a template
def read_template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """What the tokenizer's template does, found on first use.

    Raises:
        ConfigError: it does not render a question and its answer.
    """
    return _read(tokenizer, _source(tokenizer), tokenizer.pad_token)


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.get_chat_template()


@lru_cache(maxsize=16)
def _read(tokenizer: PreTrainedTokenizerBase, source: str, pad: str | None) -> ChatTemplate:
    """`pad` is part of the key alone: the names of tokens take part in what a template writes."""
    template, folder = _with_fixed_date(source), str(tokenizer.name_or_path)
    turns = [_turn("user", QUESTION), _turn("assistant", ANSWER), _turn("user", NEXT)]
    try:
        whole = _text(tokenizer, template, turns[:2])
        behind = whole[whole.rindex(ANSWER) + len(ANSWER) :]
        longer = _text(tokenizer, template, turns)
        between = longer[longer.index(ANSWER) + len(ANSWER) : longer.index(NEXT)]
        prompt = _text(tokenizer, template, turns[:1], add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder}: the chat template does not render a question and its answer ({first_line(error)}); choose an "
            "instruct model"
        ) from error
    control = _control_tokens(tokenizer, source, f"{longer}{whole}{prompt}")
    behind_ids = tuple(_encode(tokenizer, behind))
    stop = next((i for i in (*behind_ids, *_encode(tokenizer, between)) if i in control.values()), None)
    closing = behind_ids[behind_ids.index(stop) :] if stop in behind_ids else behind_ids
    spelled = {token for token in control if len(token) > 1} | set(_THOUGHT.findall(source))
    return ChatTemplate(
        source=template,
        controls=_starts_of(spelled) if spelled else None,
        control_ids=frozenset(control.values()),
        stop=stop,
        closing=closing,
        takes_system=_takes_system(tokenizer, template),
        thinks=source.startswith(_THINKS),
        folder=folder,
    )


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _takes_system(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    try:
        return SYSTEM in _text(tokenizer, template, [_turn("system", SYSTEM), _turn("user", QUESTION)])
    except TemplateError:
        return False


def _control_tokens(tokenizer: PreTrainedTokenizerBase, source: str, rendered: str) -> dict[str, int]:
    """The tokens that structure a conversation, with their ids.

    Those marked special, those that the template writes, and those that look like it. An added token that is a word, a
    blank or a tag of a page's text is none: text that holds it is read as the model was trained to.
    """
    written = set(_encode(tokenizer, rendered))
    found = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for number, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        by_template = (number in written and re.search(r"[^\w\s]", text)) or (
            _TAG.fullmatch(text) and text in source
        )
        if token.special or by_template or _PIPED.fullmatch(text):
            found[text] = number
    return found


def _starts_of(words: set[str]) -> re.Pattern[str]:
    """Matches the first character of each of `words` wherever one stands, within another too; fast for thousands."""

    def rest(words: set[str]) -> str:
        if "" in words:
            return ""
        branches = [
            re.escape(c) + rest({w[1:] for w in words if w[0] == c}) for c in sorted({w[0] for w in words})
        ]
        return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"

    firsts = sorted({word[0] for word in words})
    return re.compile(
        "|".join(f"{re.escape(c)}(?={rest({w[1:] for w in words if w[0] == c})})" for c in firsts)
    )


def _with_fixed_date(source: str) -> str:
    """The template with `strftime_now` in front that gives `FIXED_DATE`: else keys would change overnight."""
    if "strftime_now" not in source:
        return source
    dates = {text: FIXED_DATE.strftime(text) for _, text in _DATE.findall(source)}
    default = FIXED_DATE.strftime("%d %b %Y")
    macro = (
        f"{{%- macro strftime_now(format) %}}{{{{ {dates!r}.get(format, {default!r}) }}}}{{%- endmacro %}}\n"
    )
    return macro + source


# ------------------------------------------------------------------ rendering
def _text(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> str:
    return tokenizer.apply_chat_template(
        list(messages), chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
    )


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation by the chat template; no token is added in front or behind.

    Raises:
        DataError: the template refuses the conversation.
    """
    template = read_template(tokenizer)
    folded = messages if template.takes_system else _folded(messages)
    mark, marked = _marked(tokenizer, template, folded)
    try:
        text = _text(tokenizer, template.source, marked, add_generation_prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template of {template.folder} refuses turns of {roles} ({first_line(error)}); leave such rows out "
            "or choose another instruct model in model.name"
        ) from error
    return _encode(tokenizer, text) if mark is None else _encode_marked(tokenizer, text, mark)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text alone, without control tokens."""
    mark, marked = _marked(tokenizer, read_template(tokenizer), [_turn("user", text)])
    content = marked[0]["content"]
    return _encode(tokenizer, content) if mark is None else _encode_marked(tokenizer, content, mark)


def _folded(messages: Sequence[Message]) -> list[Message]:
    """A system turn in front of the first user's text, an empty line between, as authors of templates without one do."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": content}, *messages[2:]]


def _marked(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: Sequence[Message]
) -> tuple[str | None, list[Message]]:
    """The messages with a mark behind the first character of every control token that they spell, and that mark.

    No mark where they spell none. A text that spells one only once the tokenizer has normalised it is normalised first.
    """
    if template.controls is None:
        return None, list(messages)
    texts = [_as_matched(tokenizer, template.controls, message["content"]) for message in messages]
    if not any(map(template.controls.search, texts)):
        return None, list(messages)
    mark = next(mark for mark in MARKS if not any(mark in text for text in texts))
    return mark, [
        {**message, "content": _break(text, mark, template, thoughts=message["role"] == "assistant")}
        for message, text in zip(messages, texts, strict=True)
    ]


def _as_matched(tokenizer: PreTrainedTokenizerBase, controls: re.Pattern[str], text: str) -> str:
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None or controls.search(text):
        return text
    normalised = normalizer.normalize_str(text)
    return normalised if controls.search(normalised) else text


def _break(text: str, mark: str, template: ChatTemplate, *, thoughts: bool) -> str:
    """`text` with the marks; an assistant's thoughts keep their tags where thoughts are switched on."""
    places = [
        match.end()
        for match in template.controls.finditer(text)
        if not (thoughts and template.thinks and _THOUGHT.match(text, match.start()))
    ]
    bounds = [0, *places, len(text)]
    return mark.join(text[a:b] for a, b in pairwise(bounds))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, mark: str) -> list[int]:
    """Ids of `text` without those of its marks; piece by piece where a token holds more than the mark."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = [text[start:end] for start, end in encoded["offset_mapping"]]
        if all(span == mark or mark not in span for span in spans):
            return [i for i, span in zip(encoded["input_ids"], spans, strict=True) if span != mark]
    return [i for piece in text.split(mark) for i in _encode(tokenizer, piece)]


# ------------------------------------------------------------------ what others ask of a template
def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A key of how this tokenizer renders and splits a fixed conversation, with its template and vocabulary size."""
    example = [
        {"role": "user", "content": "Where is the café? 12+34"},
        {"role": "assistant", "content": "On the  left,\n\nby the river."},
        {"role": "user", "content": "Thanks"},
    ]
    text = (
        f"{tokenizer.chat_template}|{len(tokenizer)}|{render(tokenizer, example, add_generation_prompt=True)}"
    )
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def stop_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant turn: the first control token that the template writes behind an answer.

    Raises:
        ConfigError: there is none, so a policy could not learn to stop.
    """
    template = read_template(tokenizer)
    if template.stop is None:
        raise ConfigError(
            f"{template.folder}: the chat template ends an assistant turn without a special token; choose an instruct model"
        )
    return template.stop


def end_of_turn(tokenizer: PreTrainedTokenizerBase, response: Sequence[int]) -> int:
    """Position of the token that ends the assistant's turn in the tokens of a rendered response.

    Raises:
        ConfigError: the template ends a turn without a special token, or not the last one of a conversation.
    """
    stop = stop_token(tokenizer)
    for position in range(len(response) - 1, -1, -1):
        if response[position] == stop:
            return position
    raise ConfigError(
        f"{read_template(tokenizer).folder}: the chat template ends the last assistant turn without a special token"
    )


# ------------------------------------------------------------------ settings and refusals
def set_thinking(tokenizer: PreTrainedTokenizerBase, enabled: bool) -> None:
    """Write the switch into the template, so that every reader of the saved tokenizer renders alike.

    A template that knows no such switch stays as it is where thoughts are off.
    """
    source, names = _SWITCH.sub("", _source(tokenizer)), thinking_switches(tokenizer)
    if enabled:
        names = list(dict.fromkeys([THINKING_NAMES[0], *names]))
    lines = "".join(f"{{%- set {name} = {str(enabled).lower()} %}}\n" for name in names)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {**tokenizer.chat_template, "default": lines + source}
    else:
        tokenizer.chat_template = lines + source


def thinking_switches(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The variables by which the template's own code switches thoughts on and off."""
    used = _variables(_SWITCH.sub("", _source(tokenizer)))
    return [name for name in THINKING_NAMES if name in used]


def _variables(source: str) -> set[str]:
    """Names in the code of a template, those of attributes left out."""
    tokens = [(kind, text) for _, kind, text in Environment().lex(source) if kind != "whitespace"]
    before = [("", ""), *tokens]
    return {
        text
        for (kind, text), (_, left) in zip(tokens, before, strict=False)
        if kind == "name" and left != "."
    }


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer whose chat template cannot serve a reward model; name its pad token where it names none.

    Raises:
        ConfigError: no chat template, no token to pad with, or a template that ends in the pad token (a plain
            sequence classifier would then read the reward before it).
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where}: the tokenizer has no chat template; choose an instruct model in model.name"
        )
    last = render(tokenizer, [_turn("user", "a"), _turn("assistant", "b")])[-1]
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _pad_token(tokenizer, last, where)
    if last == tokenizer.pad_token_id:
        raise ConfigError(
            f"{where}: the chat template ends in the pad token {tokenizer.pad_token!r}, so a reward would be read one "
            "token early; set another pad token in the tokenizer's folder"
        )


def _pad_token(tokenizer: PreTrainedTokenizerBase, last: int, where: str) -> str:
    """A token of the vocabulary to pad with: one made for it, the unknown token, the end of a text, one never written.

    Raises:
        ConfigError: there is none; says where to write one.
    """
    special = {i: t.content for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special}
    example = [_turn("user", "a"), _turn("assistant", "b"), _turn("user", "c")]
    written = {last, *render(tokenizer, example, add_generation_prompt=True)}
    named = [text for text in special.values() if re.search(r"(?<![a-z])pad(?![a-z])", text.casefold())]
    unwritten = [text for i, text in special.items() if i not in written]
    candidates = [*named, tokenizer.unk_token, tokenizer.eos_token, *unwritten]
    for token in candidates:
        if token and tokenizer.convert_tokens_to_ids(token) not in (None, last):
            return token
    raise ConfigError(
        f'{where}: the tokenizer has no pad token; write "pad_token" into its tokenizer_config.json, a token of its '
        "vocabulary other than the one its chat template ends in"
    )


def check_trained_template(tokenizer: PreTrainedTokenizerBase, where: str, *, rows: int) -> None:
    """Refuse a template by which no policy could be trained.

    Args:
        rows: of the model's embedding.

    Raises:
        ConfigError: a token beyond the embedding, no end of turn, or an answer that reads otherwise in a pair than sampled.
    """
    stop = stop_token(tokenizer)
    for name, token in (("pad token", tokenizer.pad_token_id), ("end of turn", stop)):
        if token >= rows:
            raise ConfigError(
                f"{where}: the {name} {tokenizer.convert_ids_to_tokens(token)!r} has id {token}, but the model's embedding "
                f'has {rows} rows; write a token of the model\'s own vocabulary as "pad_token" into tokenizer_config.json'
            )
    template, question = read_template(tokenizer), [_turn("user", QUESTION)]
    prompt = _text(tokenizer, template.source, question, add_generation_prompt=True)
    said = ANSWER
    if template.thinks:
        said = f"Thought\n</think>\n\n{ANSWER}"
        said = said if prompt.rstrip().endswith("<think>") else f"<think>\n{said}"
    whole = _text(tokenizer, template.source, [*question, _turn("assistant", said)])
    start = prompt.rstrip()
    if not whole.startswith(start) or not whole[len(start) :].lstrip().startswith(said):
        shown = whole[whole.index(QUESTION) + len(QUESTION) :][:80]
        raise ConfigError(
            f"{where}: by its chat template an answer is read otherwise in a pair than sampled: a prompt ends in "
            f"{prompt[-40:]!r}, a conversation goes on in {shown!r}; model.enable_thinking is "
            f"{str(template.thinks).lower()}, set the other or choose a model whose thoughts can be left out"
        )


def describe_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """One line that says what was found."""
    template = read_template(tokenizer)
    stop = tokenizer.convert_ids_to_tokens(stop_token(tokenizer))
    closing = tokenizer.decode(template.closing[1:] if template.writes_stop else template.closing)
    ending = f"{stop!r}, then {closing!r}" if closing else repr(stop)
    system = "a turn of its own" if template.takes_system else "folded into the first user turn"
    facts = [f"a turn ends in {ending}", f"padding is {tokenizer.pad_token!r}", f"a system turn is {system}"]
    if "strftime_now" in template.source:
        facts.append(f"its date is fixed to {FIXED_DATE:%Y-%m-%d}")
    if template.thinks:
        facts.append("thoughts are on")
    return f"chat template: {', '.join(facts)}"
