"""Chat templates by the names that people know their formats by, in Jinja as transformers reads it.

Each follows the format of the models that it is called after: ChatML's turns between ``<|im_start|>`` and
``<|im_end|>``, the headers of Llama 3, Mistral's ``[INST]``, Alpaca's headings, EXAONE's roles in brackets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from streammerge.companions.kinds import read_template

_EACH = "{% for message in messages %}"
_END = "{% endfor %}"
TEMPLATES: Mapping[str, str] = {
    "chatml": (
        f"{_EACH}{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}}}"
        f"{_END}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
    ),
    "llama3": (
        f"{{{{ bos_token }}}}{_EACH}{{{{ '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
        f"{_END}{{% if add_generation_prompt %}}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(system='') %}"
        f"{_EACH}{{% if message['role'] == 'system' %}}"
        "{% set ns.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
        f"{_END}"
    ),
    "alpaca": (
        f"{_EACH}{{% if message['role'] == 'user' %}}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}"
        f"{_END}{{% if add_generation_prompt %}}{{{{ '### Response:\\n' }}}}{{% endif %}}"
    ),
    "exaone": (
        f"{_EACH}{{% if message['role'] == 'user' %}}"
        "{{ '[|user|]' + message['content'] + '\\n' }}"
        "{% else %}{{ '[|' + message['role'] + '|]' + message['content'] + '[|endofturn|]\\n' }}"
        f"{{% endif %}}{_END}{{% if add_generation_prompt %}}{{{{ '[|assistant|]' }}}}{{% endif %}}"
    ),
}
"""Templates by name."""
AUTO = "auto"
"""The word for the template that most of the inputs have."""


def find_template(wanted: str, directories: Iterable[Path]) -> str | None:
    """Return the text of the template that a recipe asks for; None if no input has one.

    Args:
        wanted: A name, :data:`AUTO`, or a text in Jinja.
        directories: Those of the inputs, in order.

    Raises:
        CheckpointError: A template cannot be read.
    """
    if wanted != AUTO:
        return TEMPLATES.get(wanted, wanted)
    read = (read_template(directory) for directory in directories)
    texts = [each.texts["default"] for each in read if each is not None and "default" in each.texts]
    counts = Counter(texts)
    # Of equally many the first.
    return max(counts, key=lambda text: counts[text], default=None)
