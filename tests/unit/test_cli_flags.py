# SPDX-License-Identifier: Apache-2.0
"""vLLM's flags mean to `cna-vllm serve` what they mean to `vllm serve`."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from cna_vllm.cli import serve
from cna_vllm.cli.engine_args import set_cpu_defaults
from cna_vllm.cli.usage import UsageError
from cna_vllm.serving.seams.command_line import make_server_arg_parser

LINES = 200
# Each line a group of words that belong together; what vLLM's parser treats in a way of its own.
THEIRS = """
--dtype float32
--dtype=bfloat16
--max-model-len 1k
--max_model_len=2048
--tensor-parallel-size 2
-tp 2
-tp=4
-asc 2
--no-enforce-eager
--no_enable_prefix_caching
--enable_prefix_caching
--enable-log-requests
--host 0.0.0.0
--port 8001
--port=9000
--served-model-name a b_c
--served_model_name=x_y
--chat-template --circuit=x=y
--chat-template=--circuit
--chat-template={{_m_}}
--chat_template_content_format string
-O3
-O=2
-O 1
-O.mode=0
-O.cudagraph_mode NONE
--compilation-config {"mode":0,"custom_ops":["none"]}
--compilation-config.mode 0
--compilation-config.pass_config.fuse_norm_quant=false
--compilation_config.custom_ops+=none
--compilation-config.custom_ops+ +rms_norm,+silu_and_mul
--hf-overrides.rope_theta 100.5
--hf_overrides.rope_scaling.rope_type=yarn
--hf-overrides {"a_b":{"c_d":1}}
--hf-overrides.text_config.max_position_embeddings 2k
--hf-overrides.x_y --circuit
--hf-overrides.x_y --a_b
--override-generation-config {"max_new_tokens":5}
--override-generation-config.max_new_tokens=7
--override_generation_config.top_k 3
--default-chat-template-kwargs {"enable_thinking":false}
--default-chat-template-kwargs.enable_thinking=false
--default_chat_template_kwargs.enable_thinking true
--speculative-config {"method":"ngram","num_speculative_tokens":2}
--speculative-config.method=ngram
--limit-mm-per-prompt.image 2
--mm-processor-kwargs.size_x.longest_edge=3
--kv-events-config.topic a_b
--additional-config {"other_key":{"a_b":1}}
--additional-config.other.a_b=2
--additional_config.other.c 3
--generation-config vllm
--gpu-memory-utilization 0.3
--gpu_memory_utilization=.25
--seed 7
--max-num-seqs 1K
--max-num-batched-tokens=4096
--middleware a.b_c
--middleware=d.e
--lora-modules x=y {"name":"a_b","path":"p_q"}
--allowed-origins ["*"]
--api-key k_1 k_2
--max-model 512
--disable-log-stats
--trust-remote-code
--quantization fp8
--block_size=32
--no-such-flag 1
--compilation-config.mode
-1.5
--task generate
""".strip().splitlines()
OURS = """
--circuit f=f.json
--circuit=g=f.json
--adapter f-off=f@0
--adapter=f-more=f@-1.5:all
--circuits dir
--circuit_dir dir
--circuit-dir=dir
--registry_dir dir
--max-circuits 4
--max_circuits_per_request=2
--max-multiplier 1e3
--max_neurons 5
""".strip().splitlines()


def lines(count: int) -> list[tuple[list[str], list[str]]]:
    """Command lines without and with our own options between vLLM's flags. Every group of words
    is in a short one too."""
    draw = random.Random(0)
    chosen = [[group] for group in THEIRS]
    chosen += [draw.sample(THEIRS, draw.randint(2, 6)) for _ in range(count - len(chosen))]
    made = []
    for groups in chosen:
        theirs = [*groups]
        theirs.insert(0 if draw.random() < 0.7 else len(theirs), "m")
        both = list(theirs)
        for group in draw.sample(OURS, draw.randint(0, 3)):
            both.insert(draw.randint(0, len(both)), group)
        made.append((_words(theirs), _words(both)))
    return made


def _words(groups: list[str]) -> list[str]:
    return [word for group in groups for word in group.split()]


def theirs(argv: list[str]) -> dict[str, Any] | None:
    """What vLLM's own parser makes of it; None where it refuses."""
    try:
        found = vars(_their_parser().parse_args(argv))
    except (SystemExit, IndexError):
        return None
    return _without_model(found)


@functools.cache
def _their_parser() -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_server_arg_parser(FlexibleArgumentParser())
    set_cpu_defaults(parser)
    return parser


def ours(argv: list[str]) -> dict[str, Any] | None:
    try:
        _, rest = serve._parser().split(argv)
        return _without_model(vars(serve.server_args(rest)))
    except UsageError:
        return None


def _without_model(found: dict[str, Any]) -> dict[str, Any]:
    """Ours fills both places of the model in."""
    return {**found, "model": None, "model_tag": found["model_tag"] == "m"}


def test_both_parsers_give_the_same_namespace(capsys: pytest.CaptureFixture[str]) -> None:
    refused = 0
    for plain, mixed in lines(LINES):
        expected, found = theirs(plain), ours(mixed)
        refused += expected is None
        assert (found is None) == (expected is None), mixed
        if expected is not None and found is not None:
            assert repr(found) == repr(expected), mixed
    assert 5 <= refused <= LINES // 2


@pytest.mark.parametrize("theirs_first", [True, False])
def test_dotted_keys_keep_their_underscores(theirs_first: bool) -> None:
    words = ["--hf-overrides.rope_theta=1", "m"]
    options, rest = serve._parser().split(["--max_circuits", "3", *words])
    assert (options.max_circuits, rest) == (3, words)
    args = serve.server_args(rest if theirs_first else rest[::-1])
    assert args.hf_overrides == {"rope_theta": 1}


def test_values_that_look_like_our_options_stay_theirs() -> None:
    words = ["--hf-overrides.x", "--circuit", "--", "--circuit"]
    options, rest = serve._parser().split(words)
    assert options.circuit == [] and rest == words


def test_a_file_of_flags_is_read_as_vllm_reads_it(tmp_path: Path) -> None:
    settings = {"max_model_len": 512, "enforce-eager": False, "served-model-name": ["a", "b"]}
    settings |= {"hf-overrides": {"a_b": {"c": 1}}, "enable-log-requests": True}
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({**settings}))  # JSON is YAML
    mine = tmp_path / "mine.yaml"
    mine.write_text(json.dumps({"max_circuits": 4, **settings}))
    for words in (["m", "--config", "{}"], ["--config", "{}", "--port", "8001"]):
        expected = theirs([word.format(file) for word in words])
        for path in (file, mine):
            found = ours([word.format(path) for word in words])
            assert found is not None and expected is not None
            assert repr(found | {"model": None}) == repr(expected | {"model": None})
    assert repr(ours(["m", f"--config={mine}"])) == repr(theirs(["m", "--config", str(file)]))
