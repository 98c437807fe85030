"""The reward `model`: what it asks of a model, what it is told, and how conversations are cut into
batches. What the scores are: tests/policy/test_classifier.py.
"""

import pytest
import torch

from lowmem_grpo.errors import ConfigError, ModelError, PlanError
from lowmem_grpo.rewards import load_rewards, score
from lowmem_grpo.rewards.model import Batch, batches, largest_batches
from lowmem_grpo.tasks import load_task
from tests.tiny import make_tiny_model, make_tiny_reward_model

TEXTS = ["7", "it is seven, I think", "7", "no", "x" * 60, ""]


@pytest.fixture(scope="module")
def task():
    return load_task("arithmetic:digits=1", seed=0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_tiny_reward_model(tmp_path_factory.mktemp("reward") / "model")


def opened(task, spec, conversation=256):
    (reward,) = load_rewards([spec], None, task, conversation=conversation)
    reward.function.load("cpu", torch.float32)
    return reward


def scored(task, reward, texts=TEXTS):
    problems = [task.train_problem(i // 3) for i in range(len(texts))]
    return score([reward], texts, problems, [[] for _ in texts])


def test_a_score_is_of_the_conversation_in_the_models_own_words(task, directory):
    reward = opened(task, f"model:{directory}")
    found = scored(task, reward)
    model = reward.function.classifier
    rows = []
    for i, text in enumerate(TEXTS):
        question = task.train_problem(i // 3).messages[-1]["content"]
        written = f"<u>{question}<e><a>{text}<e>"
        rows.append(reward.function._tokenizer(written, add_special_tokens=False).input_ids)
        assert rows[-1][0] == 2  # <u>
    expected = [model.logits([row])[0, 0].item() for row in rows]
    assert found.by_name["model"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert not found.failures
    assert found.total == found.by_name["model"]
    assert found.total[0] == found.total[2]  # the same conversation
    assert len(set(found.total)) == 5


def test_batches_are_cut_by_tokens_and_change_no_score(task, directory):
    one = opened(task, f"model:{directory},batch=1")
    few = opened(task, f"model:{directory},batch=150")
    many = opened(task, f"model:{directory}")
    expected = scored(task, one).total
    for reward in (few, many):
        assert scored(task, reward).total == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert all(batch.rows == 1 for batch in one.function.met)
    assert 1 < len(few.function.met) < 5
    assert all(batch.rows * batch.tokens <= 150 for batch in few.function.met)
    assert [batch.rows for batch in many.function.met] == [5]


def test_batches_go_from_the_longest_to_the_shortest():
    rows = [(1,) * length for length in (3, 9, 2, 4, 4, 1)]
    found = [[len(row) for row in batch] for batch in batches(rows, 8)]
    assert found == [[9], [4, 4], [3, 2], [1]]
    assert largest_batches(10, 35) == [Batch(3, 10, True), Batch(4, 8, True)]
    assert largest_batches(1366, 4096)[1] == Batch(3, 1365, True)
    assert largest_batches(10, 40) == [Batch(4, 10, True)]
    assert largest_batches(30, 35) == [Batch(1, 30, False), Batch(2, 17, True)]
    assert largest_batches(30, 1) == [Batch(1, 30, False)]


def test_what_is_too_long_has_no_score_and_is_counted(task, directory, caplog):
    found = scored(task, opened(task, f"model:{directory},max=60"))
    (place,) = found.failures["model"]
    assert place == 4
    failure = found.failures["model"][4]
    assert failure.reason == "invalid"
    assert "tokens, the limit is 60 (max=TOKENS)" in failure.message
    assert found.by_name["model"][4] is None
    assert "failed for 1 of 6 completions" in caplog.text
    reward = opened(task, f"model:{directory}", conversation=30)
    assert scored(task, reward).failures["model"].keys() == {4}  # twice 30


def test_where_all_are_too_long_nothing_is_moved(task, directory, monkeypatch):
    reward = opened(task, f"model:{directory},max=3")
    monkeypatch.delattr(type(reward.function.classifier), "on_device")
    assert len(scored(task, reward).failed) == len(TEXTS)


def test_a_score_that_is_no_number_has_failed(task, directory):
    reward = opened(task, f"model:{directory}")
    reward.function.classifier.model.score.weight.data.fill_(torch.nan)
    found = scored(task, reward)
    assert len(found.failed) == len(TEXTS)
    assert found.failures["model"][0].message == "its score is nan"


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_out_of_memory_it_goes_on_with_smaller_batches(task, directory, monkeypatch, caplog, kind):
    reward = opened(task, f"model:{directory},batch=400")
    expected, most = scored(task, reward).total, 100
    words = "CUDA out of memory"
    if kind is torch.AcceleratorError:
        words = "CUDA error: out of memory"
    plain = reward.function.classifier.logits

    def limited(rows):
        if sum(map(len, rows)) > most:
            raise kind(f"{words}.\nMore.")
        return plain(rows)

    monkeypatch.setattr(reward.function.classifier, "logits", limited)
    assert scored(task, reward).total == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert "repeated with batch=200" in caplog.text
    assert "repeated with batch=100" in caplog.text
    caplog.clear()
    scored(task, reward)
    assert not caplog.text
    most = 50
    with pytest.raises(PlanError, match=rf"longest conversation by itself: {words}; lower max="):
        scored(task, reward)


def test_one_of_several_labels_is_the_score(task, tmp_path):
    labels = {"bad": 0, "good": 1}
    names = {"id2label": {i: name for name, i in labels.items()}, "label2id": labels}
    make_tiny_reward_model(tmp_path, **names, num_labels=2)
    with pytest.raises(ConfigError, match=r"2 labels \(bad, good\).*label=good"):
        opened(task, f"model:{tmp_path}")
    with pytest.raises(ConfigError, match=r"no label 'goood' \(did you mean 'good'"):
        opened(task, f"model:{tmp_path},label=goood")
    found = [
        scored(task, opened(task, f"model:{tmp_path},label={label}")).total
        for label in ("bad", "good", "1")
    ]
    assert found[1] == found[2]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("model", "write model:NAME"),
        ("model:", "write model:NAME"),
        ("model:{},max=x", "write model:NAME"),
        ("model:{},batch=0", "write model:NAME"),
        ("model:{},limit=5", "write model:NAME"),
        ("model:{},max=513", "above the model's window of 512 tokens"),
        ("model:{}/absent", "no such model directory"),
        ("model:nothing", "unknown model 'nothing'"),
        ("model:{},template=absent.jinja", "template: no such file: absent.jinja"),
        ("modell:{}", "did you mean 'model'"),
    ],
)
def test_wrong_specifications_name_the_value(task, directory, spec, says):
    with pytest.raises((ConfigError, ModelError)) as caught:
        load_rewards([spec.format(directory)], None, task)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_chat_template_is_needed_and_has_to_take_the_messages(task, tmp_path):
    make_tiny_reward_model(tmp_path)
    template = tmp_path / "chat_template.jinja"
    written = template.read_text()
    template.unlink()
    with pytest.raises(ModelError, match=r"no chat template: give one with model:.*template=FILE"):
        opened(task, f"model:{tmp_path}")
    file = tmp_path / "own.jinja"
    file.write_text(written)
    expected = scored(task, opened(task, f"model:{tmp_path},template={file}")).total
    template.write_text(written)
    assert scored(task, opened(task, f"model:{tmp_path}")).total == expected
    file.write_text("{{ raise_exception('no room for a user') }}")
    with pytest.raises(ConfigError, match=r"does not take the messages of .*no room for a user"):
        opened(task, f"model:{tmp_path},template={file}")
    picky = "{% if messages[-1].content == 'no' %}{{ raise_exception('no') }}{% endif %}"
    file.write_text(picky + written)
    found = scored(task, opened(task, f"model:{tmp_path},template={file}"))
    assert found.failures["model"].keys() == {3}
    assert "does not take its messages: no" in found.failures["model"][3].message


def test_pickles_and_models_that_score_nothing_are_refused(task, tmp_path):
    make_tiny_model(tmp_path / "policy")
    with pytest.raises(ModelError, match="LlamaForCausalLM, which scores nothing"):
        opened(task, f"model:{tmp_path / 'policy'}")
    make_tiny_reward_model(tmp_path / "reward")
    (tmp_path / "reward" / "model.safetensors").rename(tmp_path / "reward" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"which is a pickle.*safetensors"):
        opened(task, f"model:{tmp_path / 'reward'}")


def test_it_is_called_beside_the_others_in_the_callers_thread(task, directory):
    reward = opened(task, f"model:{directory}")
    (number,) = load_rewards(["number"], None, task)
    grad = torch.is_grad_enabled()
    problems = [task.train_problem(0)] * 2
    found = score([number, reward], ["1", problems[0].answer], problems, [[], []])
    assert list(found.by_name) == ["number", "model"]
    assert found.by_name["number"] == [0.0, 1.0]
    assert found.total == pytest.approx(
        [a + b for a, b in zip(*found.by_name.values(), strict=True)]
    )
    assert torch.is_grad_enabled() is grad
    assert not any(p.requires_grad for p in reward.function.classifier.model.parameters())
