import subprocess
import sys
from pathlib import Path

import pytest

from mmrl_core.data.templates import Template, load_template, template_names
from mmrl_core.errors import DataError

USER = [{"role": "user", "content": "What is {{1}}+1? "}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *USER]
R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> answer here </answer>. Put your final answer within \\boxed{}."
)
TAIL = "What is {{1}}+1? <|im_end|>\n<|im_start|>assistant\n"
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
HEAD3 = "<|begin_of_text|>"
USER3 = (
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is {{1}}+1? <|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
DEEP = "<｜User｜>What is {{1}}+1? <｜Assistant｜>"
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."

EXACT = {
    "raw": ("What is {{1}}+1? ", None),
    "qwen": (HELPFUL + TAIL, BRIEF + TAIL),
    "qwen_r1": (f"{HELPFUL}{R1}\n{TAIL}", f"{BRIEF}{R1}\n{TAIL}"),
    "qwen_math_r1": (f"<|im_start|>system\n{BOXED}<|im_end|>\n<|im_start|>user\n{TAIL}", BRIEF + TAIL),
    "llama3": (
        HEAD3 + USER3,
        f"{HEAD3}<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>{USER3}",
    ),
    "deepseek3_r1": (f"<｜begin▁of▁sentence｜>{R1} {DEEP}", f"<｜begin▁of▁sentence｜>Be brief.{R1} {DEEP}"),
}


def test_every_template_is_pinned_here() -> None:
    assert set(template_names()) == set(EXACT)


@pytest.mark.parametrize("name", sorted(EXACT))
def test_exact_text(name: str) -> None:
    template = load_template(name)
    plain, with_system = EXACT[name]
    assert template.render(USER) == plain
    if with_system is None:
        with pytest.raises(DataError, match="without a system message"):
            template.render(SYSTEM)
    else:
        assert template.render(SYSTEM) == with_system


@pytest.mark.parametrize("name", ["qwen", "qwen_r1", "qwen_math_r1"])
def test_earlier_turns_are_closed(name: str) -> None:
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]
    text = load_template(name).render(turns)
    assert "<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\n" in text
    assert text.endswith("C<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["qwen", "llama3", "deepseek3_r1"])
def test_a_conversation_that_begins_with_an_answer_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"template {name}: an unexpected assistant message"):
        load_template(name).render([{"role": "assistant", "content": "B"}])


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"no template called 'qwen-r1'. Did you mean 'qwen_r1'\?"):
        load_template("qwen-r1")


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}\n[{{ m.role }}] {{ m.content }}\n{% endfor %}\n{% if tools %}T{% endif %}"
        "{% if nowhere is defined %}N{% endif %}{% if messages[0].tool_calls %}C{% endif %}"
        "{% if add_generation_prompt %}{{ {'a': '<\\''} | tojson }}{% endif %}\n"
    )
    assert load_template(str(path)).render(SYSTEM) == ('[system] Be brief.\n[user] What is {{1}}+1? \n{"a": "<\'"}')


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("line one\n{% for %}", r"template t.jinja:2: Expected an expression"),
        ("{{ mesages }}", "'mesages' is undefined"),
        ("{% for m in mesages %}{% endfor %}", "'mesages' is undefined"),
        ("{{ bos_token }}x", "'bos_token' is undefined"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|no attribute|not safely callable"),
        ("{{ raise_exception('no thanks') }}", "no thanks"),
        ("{{ 1 / 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_bad_templates(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Template("t.jinja", source).render(USER)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jinja: no such file"):
        load_template(str(tmp_path / "gone.jinja"))
    bad = tmp_path / "bad.jinja"
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot read it"):
        load_template(str(bad))


def test_options_and_templates_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'pyarrow', 'reasoning_gym'): sys.modules[name] = None\n"
        "import mmrl_core.data.options, mmrl_core.data.templates, mmrl_core.data.probes, mmrl_core.cli.data\n"
        "import mmrl_core.data.tables, mmrl_core.data.arithmetic, mmrl_core.data.reasoning_gym_source"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
