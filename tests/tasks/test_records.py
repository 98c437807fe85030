"""Records from files: formats, prompts, the split, the order, and files that cannot be used."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_grpo.errors import ConfigError, TaskError
from lowmem_grpo.rewards import load_rewards
from lowmem_grpo.tasks import TaskOptions, load_task
from lowmem_grpo.tasks.base import permuted


def rows_of(count):
    return [
        {"prompt": f"What is {i} + 1?", "answer": str(i + 1), "level": i % 3} for i in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


def load(path, *, seed=0, **options):
    return load_task(f"records:{path}", seed=seed, options=TaskOptions(**options))


@pytest.fixture
def hundred(tmp_path):
    return write_jsonl(tmp_path / "hundred.jsonl", rows_of(100))


def test_jsonl_csv_and_parquet_give_the_same_problems(tmp_path):
    rows = [
        {"prompt": 'Say "yes", twice\nor once', "answer": "007", "note": "\u00fc\u2028x"},
        {"prompt": "Second", "answer": "1,5", "note": ""},
        {"prompt": "Third", "answer": "c", "note": "z"},
    ]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    jsonl.write_bytes(b"\xef\xbb\xbf" + jsonl.read_bytes().replace(b"\n", b"\r\n"))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    write_parquet(tmp_path / "a.parquet", rows)
    expected = sorted((r["prompt"], r["answer"], r["note"]) for r in rows)
    for path in (jsonl, tmp_path / "a.csv", tmp_path / "a.parquet"):
        task = load(path, eval_fraction=0)
        problems = [task.train_problem(i) for i in range(3)]
        got = sorted((p.messages[0]["content"], p.answer, p.fields["note"]) for p in problems)
        assert got == expected, path


LONG = "x" * 300_000
SAME = {
    "lines.jsonl": '{"prompt":"q\u2028","answer":"1"}\n\n{"prompt":"LONG","answer":"2"}\n\n',
    "array.json": '[{"prompt":"q\u2028","answer":"1"},\n {"prompt":"LONG",\n"answer":"2"}]\n',
    "array.jsonl": '\n[ {"prompt":"q\\u2028","answer":"1"},{"prompt":"LONG","answer":"2"}]',
    "commas.csv": 'prompt,answer\nq\u2028,1\n\n"LONG",2\n',
    "semicolons.csv": "prompt;answer\nq\u2028;1\nLONG;2\n",
    "excel.csv": "sep=;\nprompt;answer\nq\u2028;1\nLONG;2\n",
    "tabs.csv": "prompt\tanswer\nq\u2028\t1\nLONG\t2\n",
    "blank.csv": "\n\nprompt,answer\n\nq\u2028,1\n\nLONG,2\n",
    "tabs.tsv": "prompt\tanswer\nq\u2028\t1\nLONG\t2\n",
}


@pytest.mark.parametrize("name", SAME)
def test_one_table_whatever_its_form_its_line_ends_and_its_length(tmp_path, name):
    limit = csv.field_size_limit()
    for encoding in ("utf-8", "utf-8-sig"):
        for ends in ("\n", "\r\n", "\r"):
            data = SAME[name].replace("LONG", LONG).replace("\n", ends).encode(encoding)
            (tmp_path / name).write_bytes(data)
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
            for path in (tmp_path / name, tmp_path / f"{name}.gz"):
                task = load(path, shuffle=False, eval_fraction=0)
                problems = [task.train_problem(i) for i in (0, 1)]
                prompts = [problem.messages[0]["content"] for problem in problems]
                assert (prompts, [p.answer for p in problems]) == (["q\u2028", LONG], ["1", "2"])
    assert csv.field_size_limit() == limit


def test_text_parts_are_joined_and_a_chat_may_be_written_as_json(tmp_path):
    parts = [{"type": "text", "text": "What is ", "url": None}, {"type": "text", "text": "1+1?"}]
    chat = [{"role": "system", "content": []}, {"role": "user", "content": parts}]
    turned = json.dumps([dict(reversed(message.items())) for message in chat])
    rows = [{"prompt": p, "answer": "2"} for p in (chat, json.dumps(chat), turned)]
    said = ({"role": "system", "content": ""}, {"role": "user", "content": "What is 1+1?"})
    for path in (
        write_jsonl(tmp_path / "p.jsonl", rows),
        write_parquet(tmp_path / "p.parquet", rows[:1]),
    ):
        task = load(path, eval_fraction=0, system_prompt="Ours.")
        assert all(task.train_problem(i).messages == said for i in range(task.num_train))


def test_a_message_has_no_names_but_its_own(tmp_path):
    call = {"type": "function", "function": {"name": "f"}}
    chat = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
    ]
    rows = [{"prompt": chat, "answer": "4"}]
    said = (chat[0], {**chat[1], "content": ""}, chat[2])
    for path in (
        write_jsonl(tmp_path / "c.jsonl", rows),
        write_parquet(tmp_path / "c.parquet", rows),
    ):
        assert load(path).train_problem(0).messages == said


def test_chat_prompts_keep_their_messages_and_their_system_prompt(tmp_path):
    user = {"role": "user", "content": "2+2?"}
    own = {"role": "system", "content": "Own."}
    rows = [{"prompt": [user], "answer": "4"}, {"prompt": [own, user], "answer": "4"}]
    task = load(
        write_parquet(tmp_path / "chat.parquet", rows), eval_fraction=0, system_prompt="Ours."
    )
    messages = sorted((task.train_problem(i).messages for i in range(2)), key=str)
    ours = {"role": "system", "content": "Ours."}
    assert messages == sorted([(ours, user), (own, user)], key=str)


def test_a_prompt_may_end_with_the_assistant_s_beginning(tmp_path):
    def turn(role, content):
        return {"role": role, "content": content}

    rows = [
        {"question": [turn("user", f"{i}+1?"), turn("assistant", "So: ")], "answer": f"#### {i}"}
        for i in range(3)
    ]
    path = str(write_jsonl(tmp_path / "p.jsonl", rows))
    options = TaskOptions(path=path, few_shot=1, system_prompt="Ours.", eval_fraction=0)
    system, asked, answered, question, beginning = (
        load_task("gsm8k", seed=0, options=options).train_problem(0).messages
    )
    assert (system, beginning) == (turn("system", "Ours."), turn("assistant", "So: "))
    assert answered["content"].startswith("So: #### ")
    for message in (asked, question):
        assert message["role"] == "user"
        assert message["content"].count("end with a line") == 1


def test_every_training_row_comes_once_in_an_epoch_in_another_order_each_time(hundred):
    task = load(hundred)
    size = task.num_train
    epochs = [[task.train_problem(e * size + i).id for i in range(size)] for e in range(3)]
    assert all(len(set(ids)) == size for ids in epochs)
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [load(hundred, seed=1).train_problem(i).id for i in range(size)]
    again = load(hundred)
    assert [again.train_problem(i).id for i in (size, 3, 0)] == [
        epochs[1][0],
        epochs[0][3],
        epochs[0][0],
    ]


def test_the_split_is_disjoint_keeps_repeats_together_and_ignores_the_seed(tmp_path):
    rows = rows_of(200) + [{"prompt": "What is 7 + 1?", "answer": "eight"}] * 3 + rows_of(200)
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    task, other = load(path, eval_fraction=0.25), load(path, eval_fraction=0.25, seed=9)
    held = [p.messages for p in task.eval_problems(1000)]
    trained = {str(task.train_problem(i).messages) for i in range(task.num_train)}
    assert len(held) == task.num_eval
    assert 25 <= task.num_eval <= 75
    assert len({str(m) for m in held}) == len(held)
    assert not trained & {str(m) for m in held}
    assert len(trained) + len(held) == 200
    assert task.eval_problems(20) == other.eval_problems(20) == task.eval_problems(1000)[:20]


def test_a_row_stays_on_its_side_when_the_file_grows(tmp_path, hundred):
    small = {p.messages for p in map(_hashable, load(hundred).eval_problems(100))}
    grown = load(write_jsonl(tmp_path / "grown.jsonl", rows_of(300)))
    trained = {_hashable(grown.train_problem(i)).messages for i in range(grown.num_train)}
    assert small
    assert not small & trained


def _hashable(problem):
    from types import SimpleNamespace

    return SimpleNamespace(messages=str(problem.messages))


@pytest.mark.parametrize(("count", "fraction"), [(2, 0.001), (2, 0.999), (3, 0.5), (7, 0.1)])
def test_small_files_have_both_sides(tmp_path, count, fraction):
    task = load(write_jsonl(tmp_path / "s.jsonl", rows_of(count)), eval_fraction=fraction)
    assert task.num_train >= 1
    assert task.num_eval >= 1
    assert task.num_train + task.num_eval == count


def test_one_row_is_trained_on_and_nothing_is_held_out(tmp_path):
    task = load(write_jsonl(tmp_path / "one.jsonl", rows_of(1)))
    assert task.train_problem(5).answer == "1"
    assert task.eval_problems(3) == []


def test_an_eval_file_is_kept_out_of_training(tmp_path, hundred):
    held = write_jsonl(tmp_path / "held.jsonl", rows_of(105)[95:])
    task = load(hundred, eval_path=str(held))
    assert (task.num_train, task.num_eval, task.num_excluded) == (95, 10, 5)
    with pytest.raises(TaskError, match="no row is left to train on"):
        load(hundred, eval_path=str(hundred))


def test_a_running_task_does_not_notice_that_its_file_changes(hundred):
    task = load(hundred)
    before = [task.train_problem(i) for i in range(10)]
    hundred.write_text("{}\n")
    assert [task.train_problem(i) for i in range(10)] == before


def test_other_columns_become_fields_and_a_renamed_answer_keeps_its_name(tmp_path):
    rows = [{"q": "2*2?", "solution": 4.0, "answer": "old", "tests": [1, {"a": None}]}]
    task = load(
        write_jsonl(tmp_path / "f.jsonl", rows), prompt_column="q", answer_column="solution"
    )
    problem = task.train_problem(0)
    assert problem.answer == "4"
    assert problem.fields == {"solution": 4.0, "tests": [1, {"a": None}]}
    assert task.default_rewards == ("number",)


@pytest.mark.parametrize(
    ("value", "text"),
    [(72.0, "72"), (1e-5, "0.00001"), (-3, "-3"), ([1, "\u00fc"], ["1", "\u00fc"]), (True, "True")],
)
def test_answers_become_text(tmp_path, value, text):
    path = write_jsonl(tmp_path / "v.jsonl", [{"prompt": "p", "answer": value}])
    assert load(path).train_problem(0).answer == text


def test_strict_lenient_and_default_reward(tmp_path):
    gsm = load(write_jsonl(tmp_path / "g.jsonl", [{"prompt": "p", "answer": "6*7\n#### 1,042"}]))
    problem = gsm.train_problem(0)
    assert gsm.default_rewards == ("number",)
    assert gsm.is_correct_strict(problem, "1,042.")
    assert not gsm.is_correct_strict(problem, "= 1042")
    assert gsm.is_correct_lenient(problem, "it is $1042.00.")
    words = load(write_jsonl(tmp_path / "w.jsonl", [{"prompt": "p", "answer": "Paris"}]))
    problem = words.train_problem(0)
    assert words.default_rewards == ("task",)
    assert [words.score(problem, t) for t in (" Paris.", "It is Paris")] == [1.0, 0.0]
    assert words.is_correct_lenient(problem, "it is PARIS!")


def test_worked_solutions_with_a_box(tmp_path):
    rows = [
        {"problem": "Half of x?", "solution": r"It is $1 \cdot \boxed{\frac{x}{2}}$."},
        {"problem": "Who?", "solution": r"\boxed{\text{Ann}}"},
    ]
    columns = {"prompt_column": "problem", "answer_column": "solution", "eval_fraction": 0}
    path = write_jsonl(tmp_path / "math.jsonl", rows)
    task = load(path, shuffle=False, **columns)
    half, who = task.train_problem(0), task.train_problem(1)
    assert task.default_rewards == ("math",)
    assert half.answer == task.reply(half) == rows[0]["solution"]
    assert task.is_correct_strict(half, task.reply(half))
    for problem, right in ((half, r"\boxed{\dfrac{x}2}"), (who, r"so \boxed{Ann}.")):
        assert task.is_correct_lenient(problem, right.replace("}2", "}{2}"))
        assert task.is_correct_strict(problem, right.replace("}2", "}{2}"))
    for text in (r"\boxed{\frac{x}{3}}", r"\boxed{", "x/2", ""):
        assert not task.is_correct_strict(half, text)
        assert not task.is_correct_lenient(half, text)
    assert not task.is_correct_strict(who, "I think Ann did.")
    assert task.is_correct_lenient(who, "It is Ann: \\boxed{Ann }")
    numbers = [{"prompt": "p", "answer": rf"\boxed{{{i}}}"} for i in range(3)]
    assert load(write_jsonl(tmp_path / "n.jsonl", numbers)).default_rewards == ("number",)
    mixed = write_jsonl(tmp_path / "m.jsonl", [*rows, {"problem": "a", "solution": "b"}])
    assert load(mixed, **columns).default_rewards == ("math",)


def test_cells_that_json_does_not_know_are_read_as_text(tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "When?", "at": datetime.date(2020, 1, 2)}],
        "answer": Decimal("72.50"),
        "when": datetime.datetime(2020, 1, 2, 3, 4),
        "raw": b"\xffab",
        "nan": float("nan"),
        "nested": [{"price": Decimal("1.10"), "n": 1, "none": None}],
    }
    problem = load(write_parquet(tmp_path / "odd.parquet", [row])).train_problem(0)
    assert problem.answer == "72.50"
    assert json.loads(json.dumps(problem.fields, allow_nan=False)) == {
        "when": "2020-01-02T03:04:00",
        "raw": "\\xffab",
        "nan": "nan",
        "nested": [{"price": "1.10", "n": 1, "none": None}],
    }
    assert json.dumps(problem.messages)
    lines = load(write_jsonl(tmp_path / "n.jsonl", [{"prompt": "p", "answer": 1, "x": row["nan"]}]))
    assert lines.train_problem(0).fields == {"x": "nan"}


def test_without_shuffling_every_epoch_has_the_order_of_the_file(hundred):
    tasks = [load(hundred, seed=seed, shuffle=False) for seed in (0, 1)]
    size = tasks[0].num_train
    for task in tasks:
        answers = [int(task.train_problem(i).answer) for i in range(2 * size)]
        assert answers[:size] == answers[size:] == sorted(answers[:size])


def test_the_path_may_be_a_setting_of_its_own(hundred):
    settings = TaskOptions(path=str(hundred))
    assert load_task("records", seed=0, options=settings).train_problem(3) == load(
        hundred
    ).train_problem(3)


BAD = {
    "no_rows.jsonl": (b"", ["no rows"]),
    "blank.jsonl": (b"\n \r\n", ["no rows"]),
    "header.csv": (b"prompt,answer\n", ["no rows"]),
    "empty.csv": (b"", ["no rows"]),
    "typo.jsonl": (
        b'{"promt": "a", "answer": "b"}',
        ["'prompt'", "did you mean 'promt'", "task.prompt_column"],
    ),
    "answer.csv": (b"prompt,label\na,b\n", ["'answer'", "prompt, label", "task.answer_column"]),
    "row.jsonl": (b'{"prompt":"a","answer":"b"}\n\n{"prompt":"a"}', ["line 3", "'answer'"]),
    "null.jsonl": (b'{"prompt":"a","answer":null}', ["line 1", "None", "'answer'"]),
    "nan.jsonl": (b'{"prompt":"a","answer":NaN}', ["line 1", "nan"]),
    "spaces.csv": (b'prompt,answer\nq,1\n"  ",2\n', ["line 3", "'prompt'"]),
    "list.jsonl": (b'["prompt"]', ["line 1", "not a JSON object"]),
    "array.json": (b'[\n{"prompt":"a","answer":"b"}\n', ["one JSON array", "line 3"]),
    "item.json": (b'[{"prompt":"a","answer":"b"},\n7]', ["object 2 (line 2)", "7"]),
    "data.json": (b'{"data": [{"prompt":"a","answer":"b"}]}', ["rows in 'data'", "jq '.data'"]),
    "indented.json": (b'{"rows": [\n {"prompt":"a","answer":"b"}\n]}', ["rows in 'rows'"]),
    "columns.json": (
        b'{\n"prompt":["a"],"answer":["b"]}',
        ["is one object", "one array of objects"],
    ),
    "half.jsonl": (
        b'{"prompt":"a","answer":"b"}\n{"prompt":"a","answer":"b","note":["\\ud83d"]}',
        ["line 2", "\\ud83d in 'note'", "surrogate"],
    ),
    "wide.csv": ("prompt,answer\na,b\n".encode("utf-16"), ["UTF-16", "save it as UTF-8"]),
    "excel.csv": (b"PK\x03\x04rest", ["zip archive"]),
    "tabs.tsv": (b"prompt\tanswer\na\tb\tc\n", ["line 2", "3 cells", "tabs"]),
    "bad.csv.gz": (b"prompt,answer\na,b\n", ["not a whole gzip file"]),
    "semicolons.csv": (b"prompt;answer\na;b;c\n", ["line 2", "3 cells", "semicolons"]),
    "broken.jsonl": (b'{"prompt":"a","answer":"b"}\n{"prompt"', ["line 2", "not JSON"]),
    "deep.jsonl": (b"[" * 100_000, ["line 1", "not JSON"]),
    "twice.jsonl": (b'{"prompt":"a","answer":"1","answer":"2"}', ["line 1", "comes twice"]),
    "digits.jsonl": (b'{"prompt":"a","answer":' + b"9" * 5000 + b"}", ["line 1", "not JSON"]),
    "latin.jsonl": (b'{"prompt":"\xfc","answer":"b"}', ["UTF-8", "0xfc"]),
    "latin.csv": (b"prompt,answer\n\xfc,b\n", ["UTF-8"]),
    "cells.csv": (b"prompt,answer\na,b\nWhat, sir?,b\n", ["line 3", "3 cells", "double quotes"]),
    "quote.csv": (b'prompt,answer\n"a,b\n', ["not CSV"]),
    "twice.csv": (b"prompt,answer,answer\na,b,c\n", ["twice"]),
    "fake.parquet": (b"PAR1 not really", ["not a parquet file"]),
    "rows.xlsx": (b"", [".xlsx", ".jsonl"]),
    "number.jsonl": (b'{"prompt":3,"answer":"b"}', ["line 1", "list of chat messages"]),
    "nochat.jsonl": (b'{"prompt":[],"answer":"b"}', ["line 1", "'prompt'"]),
    "role.jsonl": (b'{"prompt":[{"content":"a"}],"answer":"b"}', ["line 1", "role"]),
    "reply.jsonl": (
        b'{"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":""}],"answer":1}',
        ["line 1", "empty one of the assistant"],
    ),
    "monologue.jsonl": (
        b'{"prompt":[{"role":"assistant","content":"a"}],"answer":"b"}',
        ["line 1", "answers nobody"],
    ),
    "image.jsonl": (
        b'{"prompt":[{"role":"user","content":[{"type":"image","url":"x"}]}],"answer":"b"}',
        ["line 1", "'image'", "text alone"],
    ),
    "empty.jsonl": (
        b'{"prompt":[{"role":"user","content":" "}],"answer":"b"}',
        ["line 1", "empty one of the user"],
    ),
    "pictures.jsonl": (
        b'{"prompt":"a","answer":"b","images":[]}\n{"prompt":"a","answer":"b","images":["x.png"]}',
        ["line 2", "'images'", "text alone"],
    ),
    "shared.jsonl": (
        b'{"prompt":"[{\\"from\\":\\"human\\",\\"value\\":\\"a\\"}]","answer":"b"}',
        ["line 1", "name them 'role' and 'content'"],
    ),
    "sharegpt.jsonl": (
        b'{"prompt":[{"from":"human","value":"a"}],"answer":"b"}',
        ["line 1", "'role' and 'content'"],
    ),
    "repr.csv": (
        b"prompt,answer\n\"[{'role': 'user', 'content': 'a'}]\",b\n",
        ["line 2", "as Python shows it"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_says_what_and_where(tmp_path, name):
    content, says = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError) as caught:
        load(tmp_path / name)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(tmp_path))
    for part in says:
        assert part in message, message


def test_missing_files_directories_and_fractions(tmp_path, hundred):
    with pytest.raises(TaskError, match="No such file"):
        load(tmp_path / "gone.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(TaskError, match="directory"):
        load(tmp_path / "d.jsonl")
    with pytest.raises(TaskError, match="records:PATH"):
        load_task("records:", seed=0)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(TaskError, match="eval_fraction"):
            load(hundred, eval_fraction=fraction)


@given(st.integers(1, 300), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_an_empty_system_prompt_is_one(hundred):
    path = {"path": str(hundred), "system_prompt": ""}
    for spec in ("records", "arithmetic"):
        task = load_task(spec, seed=0, options=TaskOptions(**path))
        assert task.train_problem(0).messages[0] == {"role": "system", "content": ""}


@pytest.mark.parametrize("text", ['[{"a": 1}] is JSON of what?', '[{"a": 1}]', '{"content": 1}'])
def test_json_that_is_no_chat_is_a_question(tmp_path, text):
    path = write_jsonl(tmp_path / "j.jsonl", [{"prompt": text, "answer": "1"}])
    assert load(path).train_problem(0).messages == ({"role": "user", "content": text},)


def test_an_answer_behind_its_beginning_is_right(tmp_path):
    turns = (("user", "Capital?"), ("assistant", "It is "))
    chat = [{"role": role, "content": content} for role, content in turns]
    task = load(write_jsonl(tmp_path / "b.jsonl", [{"prompt": chat, "answer": "Paris"}]))
    problem = task.train_problem(0)
    texts = ("It is Paris.", "Paris", "It is not Paris")
    assert [task.is_correct_strict(problem, text) for text in texts] == [True, True, False]
    assert [task.score(problem, text) for text in texts] == [1.0, 1.0, 0.0]


def test_a_list_has_accepted_answers_and_a_nested_column_a_dotted_name(tmp_path):
    rows = [
        {
            "prompt": f"p{i}",
            "extra": {"prompt": f"nested {i}"},
            "reward_model": {"style": "rule", "ground_truth": [str(i), f"number {i}"]},
            "a.b": "flat",
            "a": {"b": "nested"},
            "written": f'["{i}", "one"]',
        }
        for i in range(4)
    ]
    for path in (
        write_jsonl(tmp_path / "v.jsonl", rows),
        write_parquet(tmp_path / "v.parquet", rows),
    ):
        task = load(path, answer_column="reward_model.ground_truth", shuffle=False)
        problem = task.train_problem(0)
        assert problem.answer == rows[0]["reward_model"]["ground_truth"]
        assert task.reply(problem) == "0"
        assert [task.score(problem, t) for t in ("0", "Number 0.", "1")] == [1.0, 1.0, 0.0]
        assert task.is_correct_strict(problem, "number 0")
        assert not task.is_correct_strict(problem, "it is number 0")
        assert task.is_correct_lenient(problem, "it is number 0, I think")
        asked = load(path, prompt_column="extra.prompt", answer_column="a.b", shuffle=False)
        assert asked.train_problem(0).messages[0]["content"] == "nested 0"
        assert asked.train_problem(0).answer == "flat"  # a column with that very name comes first
        assert (
            load(path, answer_column="written", shuffle=False).train_problem(2).answer[1] == "one"
        )
        with pytest.raises(TaskError, match=r"did you mean 'reward_model\.ground_truth'"):
            load(path, answer_column="ground_truth")
        with pytest.raises(TaskError, match=r"like task\.answer_column=reward_model\.style"):
            load(path, answer_column="reward_model")


def test_a_float_is_its_shortest_decimal_in_its_own_precision(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    kinds = {"float32": pyarrow.float32(), "float64": pyarrow.float64(), "half": pyarrow.float16()}
    for name, kind in kinds.items():
        numpy = pytest.importorskip("numpy")
        column = numpy.array([0.1, 72.0, 2.5], dtype=kind.to_pandas_dtype())
        nested = pyarrow.array([[x] for x in column], pyarrow.list_(kind))
        table = pyarrow.table({"prompt": list("abc"), "answer": column, "nested": nested})
        pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / f"{name}.parquet")
        task = load(tmp_path / f"{name}.parquet", shuffle=False, eval_fraction=0)
        assert [task.train_problem(i).answer for i in range(3)] == ["0.1", "72", "2.5"], name
        assert task.train_problem(0).fields["nested"] == [0.1]
        assert task.default_rewards == ("number",)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"style": "rule"}, "nested columns .style."),
        ([["1"]], "a list of lists"),
        ([], r"has \[\]"),
        (["1", ""], "'' in its list"),
        (["1", {"a": 1}], "nested columns .a. in its list"),
        (None, "has None"),
    ],
)
def test_a_cell_that_is_no_answer_is_refused_with_its_row(tmp_path, value, words):
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": value}]
    with pytest.raises(TaskError, match=f"line 2 .*{words}"):
        load(write_jsonl(tmp_path / "v.jsonl", rows))


LONG = "It depends on many things. " * 20


@pytest.mark.parametrize(
    ("answers", "rewards", "words"),
    [
        (["1", "2,500", "#### 3", r"\boxed{\frac12}", "5 cm"], ("number",), "number reads 100.0%"),
        (["A", "(B)", "C. "], ("choice",), "3 letters; reward choice reads 100.0%"),
        (["1", r"\sqrt{2}", "1,2"], ("math",), "2 formulas, 1 number"),
        (["Paris", "Rome", "3"], ("task",), "2 words, 1 number"),
        (["1", ["2", "two"]], ("task",), "1 of them lists"),
        (
            ["Paris", LONG],
            ("task",),
            "task reads 50.0% of them, and none that is long, like line 2",
        ),
        ([LONG], (), "no reward by default compares"),
    ],
)
def test_the_default_reward_follows_from_the_answers(tmp_path, answers, rewards, words):
    pytest.importorskip("math_verify")
    rows = [{"prompt": f"p{i}", "answer": answer} for i, answer in enumerate(answers)]
    task = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert task.default_rewards == rewards
    assert words in task.about_answers()
    if not rewards:
        with pytest.raises(ConfigError, match=r"long texts.*name a reward with --reward"):
            load_rewards([], None, task)
