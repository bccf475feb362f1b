# SPDX-License-Identifier: Apache-2.0
"""Vision-language models with images in their prompts: the text tower is steered, no other is."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_models
from tests.engine_job import run_engine
from tests.integration.conftest import PLAIN, Subject
from tests.oracles import assert_token_exact
from tests.processes import SPAWN
from tests.server import serve
from tests.torchvision_stand_in import SETUP
from tests.vision_models import FAMILIES, WORDS, Family, Look, VisionModel, draw, save

pytestmark = pytest.mark.engine

BLOCK = 32

# Bits of what the tower makes of an image, of each of its passes.
LISTEN = """
def listen(worker):
    model = worker.model_runner.get_model()
    embed, model.cna_features = model.embed_multimodal, []

    def heard(**inputs):
        features = embed(**inputs)
        model.cna_features += [bytes(f.float().numpy().tobytes()) for f in features]
        return features

    model.embed_multimodal = heard

llm.collective_rpc(listen)
"""
FORGET = "llm.reset_prefix_cache(); llm.llm_engine.reset_encoder_cache()"
# The same image was seen twice, first for a steered and then for a plain request.
UNTOUCHED = """
def compare(worker):
    model = worker.model_runner.get_model()
    first, second = model.cna_features
    assert first == second and any(first)
    tower = [
        name
        for name, module in model.named_modules()
        if any(hasattr(child, "row_slot") for child in module.children())
    ]
    assert len(tower) == 4 and all("language_model" in name for name in tower), tower

llm.collective_rpc(compare)
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_images(name: str, tmp_path: Path) -> None:
    """Every arm of prompts with either of two images or none, mixed in batches, in chunks that end
    within an image, cold and on a warm cache; then who shares whose blocks."""
    family = FAMILIES[name]
    subject = build(family, tmp_path)
    images = [draw(tmp_path / f"{seed}.png", seed) for seed in (1, 2)]
    # A block of text, an image in the second block, and some of a third.
    words = tuple(max(word, WORDS) for word in tiny_models.prompts(2, seed=5, longest=62)[1])
    looks = [Look(words[:36], words[36:62], image, family) for image in (*images, "")]
    arms = subject.matrix()
    requests, wanted = ask(subject, looks, arms)
    shared = [
        (looks[0], PLAIN, 0),
        (looks[1], PLAIN, BLOCK),
        (looks[0], subject.arm(("one", 0.0)), 2 * BLOCK),
        (looks[0], subject.arm(("one", 0.0), scope="all"), 0),
        (looks[1], subject.arm(("one", 0.0), scope="all"), BLOCK),
        (looks[1], subject.arm(("one", 0.5), scope="all"), 0),
        (looks[0], PLAIN, 2 * BLOCK),
    ]
    alone = [ask(subject, [look], [arm])[0] for look, arm, _ in shared]
    seen = [
        {"op": "run", "code": FORGET},
        {"op": "generate", "requests": ask(subject, looks[:1], [arms[2]])[0]},
    ]
    generate = {"op": "generate", "requests": requests}
    cold, warm, _, *one_by_one = run_engine(
        subject.config(
            max_model_len=128,
            max_num_seqs=16,
            max_num_batched_tokens=48,
            block_size=BLOCK,
            limit_mm_per_prompt={"image": 1, "video": 0},
        ),
        [
            generate,
            generate,
            {"op": "run", "code": FORGET},
            *({"op": "generate", "requests": one} for one in alone),
            {"op": "run", "code": LISTEN},
            *seen,
            {"op": "run", "code": FORGET},
            {"op": "generate", "requests": ask(subject, looks[:1], [PLAIN])[0]},
            {"op": "run", "code": UNTOUCHED},
        ],
        setup=SETUP,
    )
    for (look, _), output in zip(wanted, cold, strict=True):
        assert output["prompt"] == list(look)
    plain = [i for i, (_, arm) in enumerate(wanted) if arm is PLAIN]
    verdicts = subject.verdicts(wanted, cold)
    assert_token_exact([verdicts[i] for i in plain], f"{name}, without steering")
    assert_token_exact(verdicts, name)
    assert_token_exact(subject.verdicts(wanted, warm), f"{name}, warm")
    assert any(output["cached"] >= 2 * BLOCK for output in warm)
    texts = [tuple(output["token_ids"][0]) for output in cold]
    assert len(set(texts)) > len(cold) / 2, "the arms must change the text"
    assert texts[: len(arms)] != texts[len(arms) : 2 * len(arms)], "images must, too"
    outputs = [step[0] for step in one_by_one[: len(shared)]]
    pairs = [(look, arm) for look, arm, _ in shared]
    assert_token_exact(subject.verdicts(pairs, outputs), f"{name}, one by one")
    for output, (_, _, most) in zip(outputs, shared, strict=True):
        assert output["cached"] == most or (family.windowed and output["cached"] < most)
    assert any(output["cached"] for output in outputs)


@pytest.mark.skipif(SPAWN, reason="spawned processes have no stand-in for torchvision")
def test_a_server_takes_images(tmp_path: Path) -> None:
    """A chat with an image in it: plain, by fields and by an adapter's name, and misplaced."""
    family = FAMILIES["llava"]
    subject = build(family, tmp_path)
    words = tuple(range(WORDS, WORDS + 20))
    look = Look(words[:12], words[12:], draw(tmp_path / "1.png", 1), family)
    picture = base64.b64encode(Path(look.image).read_bytes()).decode()
    content = [
        {"type": "text", "text": " ".join(f"w{word}" for word in look.before)},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": " ".join(f"w{word}" for word in look.after)},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 5, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True}
    off, back = subject.arm(("one", 0.0)), subject.arm(("one", -1.0), scope="all")
    fields = {"cna_circuit": "one", "cna_multiplier": -1.0, "cna_scope": "all"}
    arguments = [
        *(f"--circuit={name}={file}" for name, file in subject.files.items()),
        "--adapter=off=one@0",
        "--served-model-name=llava",
        "--max-model-len=128",
        "--max-num-seqs=16",
    ]
    start = serve(subject.path, arguments, tmp_path / "log", module="tests.vision_server")
    with start as server, server.http() as http:
        for model, more, arm in (
            ("llava", {}, PLAIN),
            ("off", {}, off),
            ("llava", {"vllm_xargs": fields}, back),
        ):
            reply = http.post("/v1/chat/completions", json={**body, "model": model, **more})
            assert reply.status_code == 200, reply.text
            answer = reply.json()
            assert answer["prompt_token_ids"] == list(look)
            verdict = subject.oracle.check(look, answer["choices"][0]["token_ids"], arm)
            assert_token_exact([verdict], f"{model} {more}")
        reply = http.post("/v1/chat/completions", json={**body, "model": "llava", **fields})
        assert reply.status_code == 400 and "put it into vllm_xargs" in reply.text


def build(family: Family, folder: Path) -> Subject:
    """A random checkpoint, its oracle and two circuits of a fifth of its text tower's neurons."""
    path = save(family, folder / "model")
    circuits, files = tiny_models.two_circuits(folder, family.architecture)
    return Subject(str(path), VisionModel(path, family), circuits, files, {})


def ask(
    subject: Subject, looks: Sequence[Look], arms: Sequence[Any]
) -> tuple[list[dict[str, Any]], list[tuple[Look, Any]]]:
    """Every prompt in every arm, and what each one asked for."""
    wanted = [(look, arm) for look in looks for arm in arms]
    params: Mapping[str, Any] = {"max_tokens": 5, "ignore_eos": True}
    return [
        {
            "prompt": look.written,
            "image": look.image,
            "params": {**params, **subject.fields(arm)},
        }
        for look, arm in wanted
    ], wanted
