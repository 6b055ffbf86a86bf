"""What the probes are trained on tells the truth, and a small run trains, goes on, and writes probes that load."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vgen.cli import app
from vgen.errors import VgenError
from vgen.toyland import looks, probes
from vgen.toyland.probes import LOOK_FRAMES, NUM_FRAMES, VERDICTS, face_similarity
from vgen.toyland.prompts import ATTRIBUTES, identity_of
from vgen.toyland.scene import SHAPES
from vgen.training import passed
from vgen.training import probes as training
from vgen.training.loop import Budget
from vgen.training.vae import untrained_vae


def examples(count: int = 24) -> passed.Examples:
    return passed.rendered_examples(list(islice(passed.probe_clips(1), count)))


def test_examples_tell_the_truth() -> None:
    clips = list(islice(passed.probe_clips(1), 24))
    made = passed.rendered_examples(clips)
    assert made.frames.shape == (24, NUM_FRAMES, probes.SIDE, probes.SIDE, 3)
    for index, clip in enumerate(clips):
        values = [names[made.labels[index, at]] for at, names in enumerate(ATTRIBUTES.values())]
        assert values[0] == clip.scene and values[-1] == clip.camera
        assert bool(made.looks[index].isnan().any()) == (clip.subjects[0].shape != "head")
    assert [index for index in range(24) if not made.single[index]] == [5, 17], "none in sight, and two"
    assert not made.coverage[5].any() and made.coverage[0].any()


def test_each_face_comes_in_two_clips() -> None:
    faces = [clip.subjects[0].identity for clip in islice(passed.probe_clips(2), 60) if clip.subjects[0].identity]
    assert len(faces) >= 6 and faces[0::2][:3] == faces[1::2][:3] and len(set(faces)) == -(-len(faces) // 2)
    pair = list(islice(passed.head_pairs(0), 4))
    assert pair[0].subjects[0].identity == pair[1].subjects[0].identity != pair[2].subjects[0].identity
    assert pair[0].subjects[0].colour == pair[1].subjects[0].colour


def test_the_mirror_and_time_turn_labels_and_paths_with_the_frames() -> None:
    made = examples()
    path = made.path[0] * training.MIRROR
    rotation = path[:, 3:].view(NUM_FRAMES, 3, 4)[:, :, :3]
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(NUM_FRAMES), atol=1e-5), "still a rotation"
    assert training.mirror("orbit left") == "orbit right" and training.mirror("goes away") == "goes away"
    values = {value for name in ("action", "camera") for value in ATTRIBUTES[name]}
    assert set(training.REVERSED) <= values
    assert all(training.REVERSED[training.REVERSED[value]] == value for value in training.REVERSED)
    batch = training.batch_of(made, random.Random(0))
    assert batch.video.shape == (24, 3, NUM_FRAMES, probes.SIDE, probes.SIDE) and batch.video.abs().max() <= 1
    assert not torch.equal(batch.labels, made.labels)
    same = [name not in ("action", "camera") for name in ATTRIBUTES]
    assert torch.equal(batch.labels[:, same], made.labels[:, same])
    # The subject is where the coverage says, after turning as well: colours there differ from their surroundings.
    index = int(made.coverage[:, 0].float().sum((1, 2)).argmax())
    where = batch.coverage[index, 0].view(16, 16) > 0.9
    cells = torch.nn.functional.avg_pool2d(batch.video[index, :, LOOK_FRAMES[0]][None], 8)[0]
    assert (cells[:, where].mean(1) - cells[:, ~where].mean(1)).abs().max() > 0.1


def test_what_is_spoiled_has_a_verdict_that_says_so() -> None:
    rng = random.Random(1)
    batch = training.spoil(training.batch_of(examples(), random.Random(0)), rng)
    picture, order = (batch.verdicts[:, VERDICTS.index(name)] for name in ("picture", "order"))
    assert 0 < (picture == 0).sum() < 12 and ((order == 0) & (picture == 1)).any()
    for _ in range(20):
        assert training.disorder(rng) not in (list(range(NUM_FRAMES)), list(range(NUM_FRAMES))[::-1])
        assert training.no_picture(batch.video[0], rng).shape == batch.video[0].shape


def test_frayed_videos_show_the_same_and_waver() -> None:
    some = examples(2)
    video = training.batch_of(some, random.Random(0)).video[0]
    frayed = training.fray(video, random.Random(1))
    assert frayed.shape == video.shape and torch.equal(frayed, training.fray(video, random.Random(1)))
    assert 1e-4 < (frayed - video).square().mean() < 0.03
    still = training.fray(video[:, :1].expand_as(video), random.Random(1))
    assert (still[:, 0] - still[:, 1]).abs().max() > 0.05, "every frame is another"


def test_the_order_of_what_only_turns_is_not_asked_for() -> None:
    some = examples()
    at = {name: list(ATTRIBUTES).index(name) for name in ("action", "camera")}
    some.labels[:, at["camera"]] = ATTRIBUTES["camera"].index("static")
    for action, asked in (("spins", False), ("stays", False), ("jumps", True)):
        some.labels[:, at["action"]] = ATTRIBUTES["action"].index(action)
        batch = training.batch_of(some, random.Random(0))
        verdicts = [training.spoil(batch, random.Random(seed)).verdicts for seed in range(4)]
        readable = torch.cat(verdicts)[:, VERDICTS.index("picture")] == 1
        assert (torch.cat(verdicts)[readable][:, VERDICTS.index("order")] == 0).any() == asked


def test_turns_are_of_solids_that_spin_or_stay_and_mostly_hard_to_tell() -> None:
    clips = list(islice(passed.turn_clips(5), 300))
    subjects = [clip.subjects[0] for clip in clips]
    actions = Counter(subject.action for subject in subjects)
    assert set(actions) == {"spins", "stays"} and min(actions.values()) > 100
    assert not any(subject.shape == "head" or subject.identity for subject in subjects)
    assert {subject.shape for subject in subjects} == set(SHAPES)
    hard = [subject for subject in subjects if subject.size == "small" and subject.shape in ("cone", "cylinder")]
    assert len(hard) > len(subjects) / 2
    assert clips[:3] == list(islice(passed.turn_clips(5), 3))


def test_equal_error_of_faces() -> None:
    truths = torch.eye(3).repeat_interleave(2, 0)
    numbers = truths + 0.1 * torch.randn(6, 3, generator=torch.Generator())
    rate, threshold = training.equal_error(known_by(numbers, 0.05), truths)
    assert rate < 0.05 and abs(threshold) < 10
    worst, _ = training.equal_error(known_by(torch.randn(40, 8), 0.05), torch.eye(20).repeat_interleave(2, 0))
    assert 0.2 < worst < 0.8


def known_by(numbers: torch.Tensor, variance: float) -> torch.Tensor:
    """Return looks [N, 2, D] of numbers [N, D] that are all as well known."""
    return torch.stack([numbers, torch.full_like(numbers, variance)], 1)


def test_faces_are_compared_by_what_both_show() -> None:
    # Two looks that agree in the one number both know, and a third that differs there.
    first, alike, other = (
        torch.tensor([[seen, 0.0], [0.05, unsure]]) for seen, unsure in ((1, 0.05), (1, 0.99), (-1, 0.99))
    )
    assert face_similarity(first, alike) > 0 > face_similarity(first, other)
    # What one cannot see changes nothing, whatever the other has there.
    marked = torch.tensor([[1.0, 3.0], [0.05, 0.05]])
    torch.testing.assert_close(face_similarity(marked, alike), face_similarity(first, alike), atol=0.1, rtol=0)
    # Bayes: of heads drawn from the prior and seen with noise, the sum of the odds over all second looks is one.
    number = torch.linspace(-8, 8, 4001)
    variance = torch.tensor(0.3)
    odds = face_similarity(
        torch.tensor([[0.7], [0.3]]), torch.stack([number, variance.expand(4001)], 1)[..., None]
    ).exp()
    spread = (1 - variance).sqrt()  # of posterior means over all heads
    prior = torch.distributions.Normal(0, spread).log_prob(number).exp()
    assert abs(float(torch.trapezoid(odds * prior, number)) - 1) < 1e-3


def test_looks_are_alike_for_the_same_identity_alone() -> None:
    rng = random.Random(0)
    heads = torch.stack([looks.look(identity_of("red", rng), "red") for _ in range(200)])
    unit = torch.nn.functional.normalize(heads, dim=1)
    assert (unit @ unit.T).fill_diagonal_(0).max() < 0.95
    raw = looks.raw_look(identity_of("blue", rng), "blue")
    assert len(raw) == looks.LOOK_SIZE


def test_a_small_run_goes_on_and_its_probes_load(tmp_path: Path) -> None:
    untrained_vae().save_pretrained(tmp_path / "vae")
    small = {
        "vae": tmp_path / "vae",
        "passed_clips": 3,
        "passed_heads": 2,
        "passed_turns": 2,
        "validation_clips": 2,
        "pool_clips": 4,
        "batch_size": 4,
    }
    training.train_probes(tmp_path / "run", budget=Budget(steps=1, log_steps=1), **small)  # type: ignore[arg-type]
    training.train_probes(tmp_path / "run", budget=Budget(steps=2, log_steps=1), **small)  # type: ignore[arg-type]
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2]
    assert all("scene_right" in line for line in steps if "loss" not in line)
    assert probes.load(tmp_path / "run" / "probes").read([torch.zeros(3, 32, 32, 3, dtype=torch.uint8)])
    start = tmp_path / "run" / "probes"
    budget = Budget(steps=1, log_steps=1)
    further = training.train_probes(tmp_path / "further", start=start, budget=budget, learning_rate=1e-9, **small)  # type: ignore[arg-type]
    assert torch.allclose(further.path.weight, probes.load(start).network.path.weight, atol=1e-6)
    other = untrained_vae()
    other.decoder.conv_out.bias.data += 1
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(VgenError, match="another VAE"):
        training.train_probes(tmp_path / "run", budget=Budget(steps=3), **small)  # type: ignore[arg-type]


def test_the_renders_depend_on_the_step_alone() -> None:
    first, second = training.Renders(3, 4), training.Renders(3, 4)
    first.at(0)
    assert torch.equal(first.at(2).frames, second.at(2).frames)


def test_wrong_usage_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "probes", "--steps", "1", "--vae", str(tmp_path)])
    assert result.exit_code == 2 and "not a VAE's folder" in result.output
    assert replace(Budget(steps=1), steps=2).steps == 2
