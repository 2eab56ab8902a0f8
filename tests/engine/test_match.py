import numpy as np
import pytest

from freemerge.checkpoint.memory import MemoryCheckpoint
from freemerge.checkpoint.reader import open_checkpoint
from freemerge.match import Matcher
from freemerge.testing import tiny_llama, tiny_llama_config, write_checkpoint


def matched(base, *experts, **options):
    return Matcher(
        MemoryCheckpoint(base, "base"), [MemoryCheckpoint(e, f"e{i}") for i, e in enumerate(experts)], **options
    )


def test_equal_models_match_tensor_by_tensor():
    matcher = matched(tiny_llama(0), tiny_llama(1), tiny_llama(2))
    assert not matcher.asked_fit
    assert not matcher.problems
    assert not matcher.warnings
    assert {match.name: match.sources for match in matcher.matches} == {name: (name, name) for name in tiny_llama(0)}


def test_all_problems_are_listed_with_tensor_and_expert():
    first, second = tiny_llama(1), tiny_llama(2)
    first["model.norm.weight"] = np.zeros(7, np.float32)
    second["lm_head.weight"] = second["lm_head.weight"].astype(np.int8)
    del second["model.layers.0.mlp.up_proj.weight"]
    problems = matched(tiny_llama(0), first, second).problems
    assert problems == [
        "lm_head.weight: float32 in base, int8 in expert 1 (e1)",
        "model.layers.0.mlp.up_proj.weight: missing from expert 1 (e1)",
        "model.norm.weight: [48] in base, [7] in expert 0 (e0)",
    ]


def test_a_renamed_prefix_is_recognised():
    expert = {name.removeprefix("model."): array for name, array in tiny_llama(1).items()}
    problems = matched(tiny_llama(0), expert).problems
    renamed = [problem for problem in problems if problem.startswith("model.norm.weight: missing from expert 0 (e0)")]
    assert len(renamed) == 1
    assert renamed[0].endswith("(there it is called norm.weight: save both models with the same prefix)")


def test_extra_tensors_of_an_expert_are_a_warning():
    expert = tiny_llama(1) | {"classifier.bias": np.zeros(3, np.float32)}
    matcher = matched(tiny_llama(0), expert)
    assert not matcher.problems
    assert matcher.warnings == ["expert 0 (e0) has tensors the base has not, they are left out: classifier.bias"]


def test_integers_may_differ_and_are_the_bases():
    base, expert = {"steps": np.array([1, 2])}, {"steps": np.array([3])}
    assert not matched(base, expert).problems


def test_crop_asks_the_method():
    base, expert = {"embed_tokens.weight": np.zeros((4, 3))}, {"embed_tokens.weight": np.zeros((6, 3))}
    for answer, sources in (("crop", ("embed_tokens.weight",)), ("skip", (None,))):
        matcher = matched(base, expert, fit=lambda name, shape, theirs, answer=answer: answer)
        assert matcher.asked_fit
        assert not matcher.problems
        assert matcher.matches[0].sources == sources


# -- tied weights --------------------------------------------------------------------------------------------------


def on_disk(folder, name, tensors, **config):
    return open_checkpoint(write_checkpoint(folder / name, tensors, config=tiny_llama_config(**config)))


def tied_copy(seed):
    tensors = tiny_llama(seed)
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}


def test_a_head_no_input_stores_is_no_business_of_the_merge(tmp_path):
    base, expert = (
        on_disk(tmp_path, str(i), tiny_llama(i, tie_word_embeddings=True), tie_word_embeddings=True) for i in (0, 1)
    )
    matcher = Matcher(base, [expert])
    assert not matcher.problems
    assert "lm_head.weight" not in {match.name for match in matcher.matches}


def test_a_stored_copy_of_a_tied_head_is_dropped_where_the_base_has_none(tmp_path):
    base = on_disk(tmp_path, "base", tiny_llama(0, tie_word_embeddings=True), tie_word_embeddings=True)
    matcher = Matcher(base, [on_disk(tmp_path, "expert", tied_copy(1), tie_word_embeddings=True)])
    assert not matcher.problems
    assert not matcher.warnings


def test_a_stored_copy_in_the_base_stays_a_copy(tmp_path):
    base = on_disk(tmp_path, "base", tied_copy(0), tie_word_embeddings=True)
    without = on_disk(tmp_path, "expert", tiny_llama(1, tie_word_embeddings=True), tie_word_embeddings=True)
    matcher = Matcher(base, [without, on_disk(tmp_path, "copy", tied_copy(2), tie_word_embeddings=True)])
    assert not matcher.problems
    head = next(match for match in matcher.matches if match.name == "lm_head.weight")
    assert head.same_as == "model.embed_tokens.weight"


@pytest.mark.parametrize("stored", [True, False])
def test_an_expert_that_unties_its_head_is_a_problem(tmp_path, stored):
    tensors = tied_copy(0) if stored else tiny_llama(0, tie_word_embeddings=True)
    base = on_disk(tmp_path, "base", tensors, tie_word_embeddings=True)
    matcher = Matcher(base, [on_disk(tmp_path, "expert", tiny_llama(1), tie_word_embeddings=False)])
    assert len(matcher.problems) == 1
    assert "lm_head.weight: tied" in matcher.problems[0]
    assert "a weight of its own in expert 0" in matcher.problems[0]


def test_an_expert_that_ties_what_the_base_does_not_is_a_problem(tmp_path):
    base = on_disk(tmp_path, "base", tiny_llama(0))
    matcher = Matcher(
        base, [on_disk(tmp_path, "expert", tiny_llama(1, tie_word_embeddings=True), tie_word_embeddings=True)]
    )
    assert len(matcher.problems) == 1
    assert "lm_head.weight: a weight of its own in" in matcher.problems[0]


def test_shared_memory_in_a_state_dict_is_a_tie():
    base, expert = tiny_llama(0), tiny_llama(1)
    for tensors in (base, expert):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    matcher = matched(base, expert)
    assert not matcher.problems
    assert {match.name: match.same_as for match in matcher.matches if match.same_as} == {
        "lm_head.weight": "model.embed_tokens.weight"
    }
