"""The recipes: settings from UniPT's released scripts, reported figures as MP-ISMoE (arXiv 2605.04058) prints them.

A size that the paper's comparison does not state is said to be ours.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from .goals.answers import Answers
from .goals.boxes import Boxes
from .goals.pairs import Pairs
from .recipes import Published, Recipe

_UNIPT = "UniPT, CVPR 2024, arXiv 2308.14316, its released scripts"
_TEXT_LENGTH = 32  # tokens of captions and expressions where no cut is stated
_CLIP = "openai/clip-vit-base-patch32?tower={}&projected=true"
_BOTH_CLIP = ("vision", "text")


def _answers(count: int, score: str) -> Answers:
    pooler = {"pooler_weight": np.zeros((768, 768), np.float32), "pooler_bias": np.zeros(768, np.float32)}
    return Answers(score, {**_no_answers(count), **pooler})


def _no_answers(count: int) -> dict[str, Any]:
    """Labels of one question that has no answer, out of so many."""
    return {
        "offsets": np.zeros(2, np.int64),
        "classes": np.zeros(0, np.int64),
        "scores": np.zeros(0, np.float32),
        "vocabulary": np.array([""] * count),
    }


def _boxes() -> Boxes:
    return Boxes("blocks.5", {"boxes": np.zeros((1, 4)), "text_tokens": np.array([_TEXT_LENGTH])})


_VSE = Recipe(
    name="unipt-vse-f30k",
    source=f"{_UNIPT} for VSE-infinity",
    backbone="pair:image=resnet:resnext101_32x8d_wsl?weights=ig_resnext101_32x8-c38310e5.pth,"
    "text=hf:google-bert/bert-base-uncased",
    architecture="pair:image=resnet-config:resnext101_32x8d_wsl,text=hf-config:bert-base",
    task="f30k:retrieval?root=f30k&pool=gpo&width=1024&loss=triplet",
    settings={
        "unipt": {"width": "1024", "reduction": "2", "lr": "5e-4", "weight_decay": "1e-4", "warm_up": "0"},
    },
    epochs=25,
    batch_size=112,
    image_size=512,
    max_length=_TEXT_LENGTH,
    goal=Pairs(1024, "gpo", "triplet"),
    num_examples=31_014,
    num_captions=5 * 31_014,
    trained=12_380_226,
    published={
        "full": Published("201.2 M", 176.8, 8),
        "lst": Published("9.7 M", 24.4),
        "unipt": Published("12.4 M", 24.4),
        "sherl": Published("11.3 M", 24.4),
    },
    not_reproduced=(
        "the learning rate is divided by 10 after epoch 15; here it falls along half a cosine",
        "gradients are clipped to norm 2",
        "images are cropped and flipped, a fifth of the caption's tokens and of the image's positions are dropped",
        "in the second epoch the loss grows linearly; BERT's dropout is on",
        f"captions are cut at {_TEXT_LENGTH} tokens: ours",
    ),
)

_CLIP4CLIP = Recipe(
    name="unipt-clip4clip-msrvtt",
    source=f"{_UNIPT} for CLIP4Clip (meanP, ViT-B/32)",
    backbone="pair:"
    + ",".join(f"{s}=hf:{_CLIP.format(t)}" for s, t in zip(("image", "text"), _BOTH_CLIP, strict=True)),
    architecture="pair:image=hf-config:clip-vit-b32?tower=vision&projected=true,"
    "text=hf-config:clip-vit-b32?tower=text&projected=true",
    task="msrvtt:9k?root=msrvtt&width=512",
    settings={"unipt": {"form": "single_anchor", "reduction": "1", "lr": "1e-4", "weight_decay": "0.2"}},
    epochs=5,
    batch_size=128,
    max_length=32,
    frames=12,
    goal=Pairs(512, "mean", "contrastive", video=True),
    num_examples=10_000,
    num_captions=181_000,
    trained=9_584_642,
    published={
        "full": Published("151.3 M", 48.8, 4),
        "lst": Published("11.2 M", 32.0, 4),
        "unipt": Published("9.6 M", 13.6, 4),
        "sherl_single_anchor": Published("9.6 M", 13.6, 4),
    },
    not_reproduced=(
        "BertAdam with betas 0.9 and 0.98 and eps 1e-6; here AdamW with torch's own",
        "gradients are clipped to norm 1",
        "the frozen CLIP computes in float16 (here float32, kept in float16)",
        "the epoch is selected on the test part (here on validation)",
    ),
)

_VQA = Recipe(
    name="unipt-clipvil-vqa2",
    source=f"{_UNIPT} for CLIP-ViL",
    backbone="clipvil:vqa_clipvil.pth?text=bert-base-uncased",
    architecture="clipvil-config:base",
    task="vqa2:v2?root=vqa",
    settings={
        "unipt": {"form": "mlp", "reduction": "2", "lr": "5e-4", "schedule": "linear", "warm_up": "0.05"},
    },
    epochs=5,
    batch_size=128,
    goal=_answers(3129, "soft accuracy"),
    trained=10_730_170,
    published={
        "full": Published("236.8 M", 82.0, 4),
        "lst": Published("13.4 M", 25.6, 4),
        "unipt": Published("10.3 M", 11.6, 4),
        "sherl": Published("13.0 M", 14.0, 4),
    },
    not_reproduced=(
        "8 batches of 128 are accumulated to one step",
        "float16 with loss scaling (here float32, or --precision bf16)",
        "AdamW's weight decay was not read; UniPT's default here is taken",
        "SHERL's form for CLIP-ViL has gated down-projections and no norm; `sherl` here is that for VSE's text",
    ),
    remarks=("10.3 M are reported and 10,730,170 are counted in the released code; the difference is unexplained",),
)

_REFCOCO = Recipe(
    name="unipt-mdetr-refcoco",
    source=f"{_UNIPT} for MDETR (ResNet-101, RoBERTa-base)",
    backbone="mdetr:pretrained_resnet101_checkpoint.pth?text=roberta-base",
    architecture="mdetr-config:base",
    task="refcoco:val?root=refcoco",
    settings={"unipt": {"reduction": "2", "lr": "5e-4", "weight_decay": "1e-4", "warm_up": "0"}},
    epochs=10,
    batch_size=8,
    max_length=_TEXT_LENGTH,
    goal=_boxes(),
    trained=712_966,
    published={
        "full": Published("185.2 M", 39.6, 2),
        "lst": Published("0.9 M", 12.6, 2),
        "unipt": Published("0.7 M", 6.8, 2),
        "sherl": Published("0.7 M", 6.8, 2),
    },
    not_reproduced=(
        "the learning rate is divided by 10 after epoch 5; here it falls along half a cosine",
        "gradients are clipped to norm 0.1",
        "images are resized at random and cropped; the frozen transformer's dropout is on",
        "an average of the weights (decay 0.9998) is evaluated",
        f"expressions are cut at {_TEXT_LENGTH} tokens: ours",
    ),
)

_T5 = Recipe(
    name="unipt-t5-glue",
    source="LST's scripts for T5-base on GLUE (NeurIPS 2022, arXiv 2206.06522), whose table UniPT is in; UniPT's own "
    "code for T5 is not public",
    backbone="hf:google-t5/t5-base?tower=both",
    architecture="hf-config:t5-base?tower=both",
    task="glue:rte?root=glue",
    settings={
        "unipt": {"reduction": "4"},
        "lst": {"reduction": "8", "keep": "1,2,3,5,6,7,9,10,11", "lr": "3e-3"},
    },
    epochs=20,
    batch_size=100,
    max_length=128,
    num_outputs=2,
    goal=None,
    trained=3_039_746,
    published={
        "full": Published("100 %", 17.6),
        "lora": Published("1.71 %", 12.6),
        "bitfit": Published("0.13 %", 10.7),
        "lst": Published("1.74 %", 5.5),
        "unipt": Published("1.36 %", 2.9),
        "sherl": Published("0.85 %", 2.9),
    },
    not_reproduced=(
        "answers are generated as words by the frozen language-model head; here a linear head classifies the decoder's "
        "first step",
        "500 steps of warm-up (here a tenth of the steps)",
        "UniPT's own settings for T5, which are not public: reduction 4 gives the reported share of parameters",
    ),
    remarks=(
        "other tasks by --task glue:NAME?root=FOLDER; MNLI, QQP, QNLI and SST-2 train for 10 epochs",
        "1.36 % are of T5-base's 222,903,552 parameters, the linear head not counted",
    ),
)


def _table() -> dict[str, Recipe]:
    of_others = (
        _VSE,
        replace(
            _VSE,
            name="unipt-vse-coco",
            task=_VSE.task.replace("f30k:retrieval?root=f30k", "coco-retrieval:5k?root=coco"),
            num_examples=119_287,
            num_captions=5 * 119_287,
            remarks=("sizes of the splits: ours, from common knowledge; 1,000 of 5,000 images validate",),
        ),
        _CLIP4CLIP,
        replace(
            _CLIP4CLIP,
            name="unipt-clip4clip-msvd",
            task="msvd:retrieval?root=msvd&width=512",
            num_examples=1_970,
            num_captions=None,
        ),
        _VQA,
        replace(
            _VQA,
            name="unipt-clipvil-gqa",
            task="gqa:balanced?root=gqa",
            settings={"unipt": {**_VQA.settings["unipt"], "lr": "1e-4"}},
            goal=_answers(1842, "exact match"),
            trained=4_736_641 + 1_184_256 + 1_537 * 1842,
            remarks=("a vocabulary of 1,842 answers: ours, from common knowledge",),
        ),
        _REFCOCO,
        replace(_REFCOCO, name="unipt-mdetr-refcoco+", task="refcoco+:val?root=refcoco"),
        replace(_REFCOCO, name="unipt-mdetr-refcocog", task="refcocog:val?root=refcoco"),
        _T5,
    )
    return {recipe.name: recipe for recipe in of_others}


RECIPES = _table()
