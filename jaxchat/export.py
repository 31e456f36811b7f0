"""Write a model as a folder for Hugging Face `transformers`.

A classic model becomes stock `nanochat`; any other keeps its own type and brings the code that runs
it (torch_ref/modeling_jaxchat.py), because stock code would load it and be silently wrong. The
folder appears whole or not at all. Left out: uploads, and other formats than safetensors.

    config.json  generation_config.json  model.safetensors  [modeling_jaxchat.py]
    tokenizer.json  tokenizer_config.json  chat_template.jinja  README.md
"""

import importlib.resources
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxchat.config import count_params
from jaxchat.conversation import SYSTEM_SEPARATOR
from jaxchat.convert import CLASSIC_TYPE, HUGGING_FACE_ORIGIN, to_hugging_face
from jaxchat.report import Section, Subject, subject_of
from jaxchat.report_page import escape
from jaxchat.sampling_params import CHAT_TEMPERATURE, CHAT_TOP_K, SamplingParams
from jaxchat.stages import LoadedModel
from jaxchat.tensor_files import WEIGHTS_FILE, write_safetensors
from jaxchat.tokenizer import HUGGING_FACE_FILE, Tokenizer

MODELING_FILE = "modeling_jaxchat.py"

CHAT_TEMPLATE = """\
{%- set messages = messages | list -%}
{%- set opening = namespace(text='') -%}
{%- if messages[0].role == 'system' -%}
    {%- set opening.text = messages[0].content + SEPARATOR -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for message in messages -%}
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('user and assistant must take turns, user first') -}}
    {%- elif message.role == 'user' -%}
        {{- '<|user_start|>' + (opening.text if loop.first else '') + message.content -}}
        {{- '<|user_end|>' -}}
    {%- else -%}
        {{- '<|assistant_start|>' -}}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for part in message.content -%}
                {%- if part.type == 'python' -%}
                    {{- '<|python_start|>' + part.text + '<|python_end|>' -}}
                {%- elif part.type == 'python_output' -%}
                    {{- '<|output_start|>' + part.text + '<|output_end|>' -}}
                {%- else -%}
                    {{- part.text -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '<|assistant_end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant_start|>' -}}
{%- endif -%}
""".replace("SEPARATOR", json.dumps(SYSTEM_SEPARATOR))
"""conversation.py's rendering, for contents that spell no special token."""


def export_hugging_face(
    model: LoadedModel, directory: Path, *, name: str, source: str, sections: Sequence[Section]
) -> None:
    """Write `model` to `directory`, which must not exist or be empty.

    `name` heads the model card, `source` is the model's stage, and `sections` of the report are the
    results that the card shows. Errors of `make_way`.
    """
    make_way(directory)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write(model, staging, name, source, sections)
        staging.chmod(0o755)  # mkdtemp's folders are private
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def make_way(directory: Path) -> None:
    """Leave nothing where an export is to be; to be asked before slow work, too.

    ValueError for what is no empty folder, or one that cannot be removed, such as `.` or a link.
    """
    if directory.exists() or directory.is_symlink():
        if not directory.is_dir() or any(directory.iterdir()):
            raise ValueError(
                f"{directory} is there already and not an empty folder: choose another"
            )
        try:
            directory.rmdir()
        except OSError as error:
            raise ValueError(
                f"{directory} cannot be replaced ({error.strerror}): choose a folder in it"
            ) from None
    directory.parent.mkdir(parents=True, exist_ok=True)


def _write(
    model: LoadedModel, folder: Path, name: str, source: str, sections: Sequence[Section]
) -> None:
    tokenizer, config = model.tokenizer, model.backend.config
    tensors, described = to_hugging_face(model.backend.get_params(), config)
    described |= {"dtype": "float32", "use_cache": True, **_special_ids(tokenizer)}
    described[HUGGING_FACE_ORIGIN] = {"stage": source, "step": model.meta["step"]}
    is_stock = described["model_type"] == CLASSIC_TYPE
    if not is_stock:
        module = MODELING_FILE.removesuffix(".py")
        classes = {"AutoConfig": "JaxchatConfig", "AutoModelForCausalLM": "JaxchatForCausalLM"}
        described["architectures"] = [classes["AutoModelForCausalLM"]]
        described["auto_map"] = {auto: f"{module}.{own}" for auto, own in classes.items()}
        code = importlib.resources.files("torch_ref") / MODELING_FILE
        (folder / MODELING_FILE).write_text(code.read_text())
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    for file, content in (
        ("config.json", described),
        ("generation_config.json", _generation_config(tokenizer, config.sequence_len)),
        (HUGGING_FACE_FILE, tokenizer.to_hugging_face()),
        ("tokenizer_config.json", _tokenizer_config(tokenizer, config.sequence_len)),
    ):
        (folder / file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "README.md").write_text(model_card(model, name, source, sections, is_stock))


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    end = tokenizer.special_id("assistant_end")
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": end, "pad_token_id": end}


def _generation_config(tokenizer: Tokenizer, sequence_len: int) -> dict[str, Any]:
    """The defaults of the terminal chat; a text ends at either of two tokens, as in the Engine."""
    ids = _special_ids(tokenizer)
    ends = [ids["eos_token_id"], tokenizer.bos_id]
    sampling = {
        "do_sample": True,
        "temperature": CHAT_TEMPERATURE,
        "top_k": CHAT_TOP_K,
        "max_new_tokens": min(SamplingParams.max_tokens, sequence_len),
    }
    return ids | {"eos_token_id": ends} | sampling


def _tokenizer_config(tokenizer: Tokenizer, sequence_len: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_len,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def model_card(
    model: LoadedModel, name: str, source: str, sections: Sequence[Section], is_stock: bool
) -> str:
    """The README of the folder, with the figures that `sections` report."""
    config, trust = model.backend.config, "" if is_stock else ", trust_remote_code=True"
    kind = "stock `nanochat` model type" if is_stock else f"code that comes along ({MODELING_FILE})"
    facts = {
        "parameters": f"{sum(count_params(config).values()):,}",
        "layers": config.n_layer,
        "width": config.n_embd,
        "heads": f"{config.n_head} ({config.n_kv_head} key/value)",
        "context": f"{config.sequence_len:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
        "stage and step": f"{source}, {model.meta['step']:,}",
    }
    figures = [
        (section.stage, figure, f"{value:.4f}")
        for section in sections
        for figure, value in section.figures.items()
    ]
    results = _table(("stage", "figure", "value"), figures) if figures else "None were reported."
    specials = ", ".join(f"`<|{name}|>`" for name in model.tokenizer.special_names)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [jaxchat, nanochat]
---

# {escape(name)}

A small language model trained with jaxchat. It runs on transformers' {kind}.

{_table(("fact", "value"), list(facts.items()))}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = AutoModelForCausalLM.from_pretrained(path{trust})
{_usage(source)}
```

On a Mac's GPU this needs PyTorch 2.14 or later: attention of earlier ones is wrong there.

## Results

{results}

## Special tokens in what users write

Hugging Face tokenizers turn the text `<|python_start|>`, wherever it stands, into the special token
of that name; so with {specials}.
jaxchat itself never does: there, what users write is only ever text. Whoever serves strangers
should tokenise their messages with `split_special_tokens=True` and put the special tokens around
them as ids; with the chat template alone, a user can forge turns and tool output.
"""


def _usage(source: str) -> str:
    if source == "base":
        return (
            'inputs = tokenizer("<|bos|>The sky is", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs)[0]))"
        )
    return (
        'messages = [{"role": "user", "content": "Why is the sky blue?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")\n"
        "print(tokenizer.decode(model.generate(**inputs)[0]))"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def sections_of(sections: Sequence[Section], model: Subject) -> list[Section]:
    """The reported sections that say they are about this model, and nothing that contradicts it.

    What does not say its model is left out: it may be another one's, and a card is a claim.
    """
    found = []
    for section in sections:
        subject = subject_of(section)
        if subject is not None and all(
            said in (None, own) for said, own in zip(subject, model, strict=True)
        ):
            found.append(section)
    return found
