"""Settings of the baselines: flags, help and what is saved follow from one dataclass a model."""

from __future__ import annotations

from dataclasses import fields

import pytest

from baselines.arguments import BaselineArguments
from baselines.generative.gpt2_codes import Gpt2Codes
from baselines.generative.tiger import Tiger
from baselines.settings import SETTINGS, names_of, settings_of
from recformer.cli import flags_parser
from recformer.files import UserError


def test_defaults_are_the_published_and_the_saved_ones() -> None:
    sequence = {
        "hidden_size": 128, "num_layers": 2, "dropout": 0.2, "max_length": 50,
        "loss": "softmax", "num_negatives": 256, "gbce_t": 0.75, "temperature": 1.0,
        "cosine": False, "hard_negatives": 0, "separate_outputs": False, "items": "id",
        "text_encoder": None, "history_term": False, "projection_layers": 2, "semantic_ids": None,
        "negative_power": 0.0, "logq": False, "label_smoothing": 0.0,
        "features": None, "feature_dropout": 0.0, "swap_noise": 0.0, "soft_one_hot": 0,
    }  # fmt: skip
    generative = {
        "semantic_ids": "f", "hidden_size": 128, "num_layers": 4, "num_heads": 6, "dropout": 0.1,
        "max_length": 20, "num_beams": 50, "exact_rank": False,
    }  # fmt: skip
    heads = {"num_heads": 2}
    transformer = heads | {
        "arch": "gpt2", "objective": "clm", "mask_probability": 0.2, "max_span": 5,
        "discriminator_weight": 1.0, "separate_discriminator": False, "feed_forward_size": 0,
    }  # fmt: skip
    expected = {
        "popularity": {},
        "text_neighbours": {
            "decay": 0.6, "history_factor": 1.0, "text_encoder": None, "weighting": "tfidf"
        },
        "cooccurrence": {"decay": 0.6, "history_factor": 1.0},
        "sknn": {"neighbours": 100},
        "vsknn": {"neighbours": 100},
        "sasrec": sequence | heads | {"from_published": None},
        "gsasrec": sequence
        | heads
        | {"loss": "gbce", "separate_outputs": True, "from_published": None},
        "gru4rec": sequence | {"num_layers": 1},
        "bert4rec": sequence | transformer | {"arch": "bert", "objective": "mlm"},
        "transformer": sequence | transformer,
        "tiger": generative
        | {"head_size": 64, "feed_forward_size": 1024, "targets": "one", "user_tokens": 0},
        "gpt2_codes": generative | {"num_heads": 4},
    }  # fmt: skip
    given = {"tiger": {"semantic_ids": "f"}, "gpt2_codes": {"semantic_ids": "f"}}
    found = {model: settings_of(model, given.get(model, {})).as_dict() for model in SETTINGS}
    assert found == expected


def test_every_setting_is_a_flag_whose_help_names_the_defaults() -> None:
    text = {field.name: field.metadata["help"] for field in fields(BaselineArguments)}
    assert set().union(*map(names_of, SETTINGS)) <= set(text)
    assert text["num_layers"] == (
        "transformer or recurrent layers (2; gru4rec: 1; tiger: 4; gpt2_codes: 4)"
    )
    assert text["num_heads"].endswith("(2; tiger: 6; gpt2_codes: 4)")
    assert text["loss"].endswith("(softmax; gsasrec: gbce)")
    assert text["decay"].startswith("text_neighbours, cooccurrence: weight of an item")
    assert text["decay"].endswith("(0.6)")
    assert text["separate_outputs"].endswith("(no; gsasrec: yes)")
    assert text["semantic_ids"].startswith("file of recformer semantic-ids")
    assert text["text_encoder"].startswith("text_neighbours, sasrec")
    assert all(text[name] for name in text)


def test_only_given_settings_are_the_models_own() -> None:
    parser = flags_parser("baseline", None, BaselineArguments)
    line = ["--model", "gsasrec", "--cosine", "--num_heads", "1", "--separate_outputs", "false"]
    (args,) = parser.parse_args_into_dataclasses(line)
    assert args.own() == {"num_heads": 1, "cosine": True, "separate_outputs": False}
    assert settings_of("gsasrec", args.own()).as_dict()["separate_outputs"] is False


def test_models_made_by_hand_have_the_same_defaults() -> None:
    codes, sizes = [[0, 0], [0, 1]], [2, 2]
    gpt2 = Gpt2Codes(codes, sizes)
    assert (gpt2.gpt2.config.n_layer, gpt2.gpt2.config.n_head) == (4, 4)
    tiger = Tiger(codes, sizes)
    assert (tiger.t5.config.num_layers, tiger.t5.config.num_heads, tiger.num_beams) == (4, 6, 50)


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("nothing", {}, "--model nothing: expected one of popularity, text_neighbours"),
        ("popularity", {"decay": 1}, "--decay is no flag of --model popularity"),
        ("cooccurrence", {"decay": 2}, "--decay 2: expected from 0 to 1"),
        ("cooccurrence", {"history_factor": -1}, "--history_factor -1: expected from 0 to 1"),
        ("text_neighbours", {"weighting": "idf"}, "--weighting idf: expected one of tfidf, bm25"),
        ("transformer", {"objective": "both"}, "--objective both: expected one of clm, mlm, plm"),
        ("transformer", {"objective": "mlm"}, "--arch gpt2 .*; --objective mlm goes with .* bert,"),
        ("bert4rec", {"objective": "plm"}, "with clm or mlm or rtd; .* plm goes with --arch xlnet"),
        ("transformer", {"arch": "opt", "objective": "plm"}, "goes with --arch xlnet"),
        ("gru4rec", {"num_heads": 2}, "--num_heads is no flag of --model gru4rec"),
        ("sasrec", {"negative_power": 1}, "--negative_power goes with --loss sampled_softmax, bce"),
        ("sasrec", {"logq": True}, "--logq goes with --loss sampled_softmax or in_batch"),
        ("sasrec", {"label_smoothing": 1}, "--label_smoothing 1: must be from 0 to below 1"),
        ("gsasrec", {"label_smoothing": 0.1}, "--label_smoothing goes with --loss softmax"),
        ("bert4rec", {"separate_discriminator": True}, "goes with --objective rtd"),
        ("bert4rec", {"mask_probability": 0}, r"--mask_probability 0: must be in \(0, 1\]"),
        ("vsknn", {"neighbours": 0}, "--neighbours 0: must be at least 1"),
        ("sasrec", {"temperature": 0}, "--temperature 0: must be above 0"),
        ("sasrec", {"gbce_t": 2}, "--gbce_t 2: must be from 0 to 1"),
        ("sasrec", {"num_negatives": 0}, "--num_negatives 0: must be at least 1"),
        ("gpt2_codes", {"num_heads": 3, "semantic_ids": "f"}, "does not divide"),
        ("tiger", {}, "--model tiger needs --semantic_ids FILE"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, given, message) -> None:
    with pytest.raises(UserError, match=message):
        settings_of(model, given)


def test_earlier_names_of_objectives_mean_the_same() -> None:
    assert settings_of("bert4rec", {"objective": "masked"}) == settings_of("bert4rec", {})
    assert settings_of("transformer", {"objective": "causal"}) == settings_of("transformer", {})


def test_optimizer_and_rate_of_each_model() -> None:
    def chosen(**flags: object) -> tuple[str | None, float | None]:
        args = BaselineArguments(**flags)
        return args.optimizer, args.learning_rate

    assert chosen(model="sasrec") == ("adamw", 1e-3)
    assert chosen(model="gpt2_codes") == ("adamw", 1e-3)
    assert chosen(model="tiger") == ("adafactor", 1e-2)
    assert chosen(model="tiger", optimizer="adamw") == ("adamw", 1e-3)
    assert chosen(model="sasrec", optimizer="adafactor", learning_rate=0.5) == ("adafactor", 0.5)
