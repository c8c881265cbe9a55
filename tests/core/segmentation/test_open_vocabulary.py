"""Open-vocabulary segmenters with small models of the real classes and random weights, and with models that answer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    SamConfig,
    SamImageProcessorPil,
    SamModel,
    SamProcessor,
    SwinConfig,
    ViTImageProcessorPil,
)

from core.errors import ImageError, ModelError
from core.segmentation.open_vocabulary import (
    BACKGROUND_TAGS,
    CLIPSEG,
    TAGS,
    ClipSegmenter,
    GroundedSegmenter,
    _apart,
    _texts,
    classes_of,
    load_open_segmenter,
)
from tests.conftest import word_tokenizer

CLASSES = ("cat", "red house", "sea")
WORDS = ["cat", "red", "house", "sea", "ship"]


def images(n: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]


def bert_tokenizer() -> BertTokenizer:
    """Whole words, and the special tokens where Grounding DINO expects those of BERT."""
    vocabulary = {f"[unused{i}]": i for i in range(1040)}
    ids = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    ids |= {word: 1030 + i for i, word in enumerate(WORDS)}
    vocabulary = {token: i for token, i in vocabulary.items() if i not in ids.values()} | ids
    return BertTokenizer(vocab=dict(sorted(vocabulary.items(), key=lambda item: item[1])))


def a_detector() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=1040, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=12, max_text_len=32, disable_custom_kernels=True,
    )  # fmt: skip
    processor = GroundingDinoImageProcessorPil(size={"height": 128, "width": 128})
    return GroundingDinoForObjectDetection(config).eval(), GroundingDinoProcessor(processor, bert_tokenizer())


def a_sam() -> tuple[Any, Any]:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    vision = {"image_size": 64, "patch_size": 16, "output_channels": 16, "window_size": 2, "num_pos_feats": 8}
    config = SamConfig(
        vision_config={**small, **vision, "global_attn_indexes": [0]},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={**small, "iou_head_hidden_dim": 16, "attention_downsample_rate": 1},
    )
    size = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    return SamModel(config).eval(), SamProcessor(SamImageProcessorPil(**size))


def a_clipseg() -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer.get_vocab()), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPSegConfig(
        text_config={**small, **text, "max_position_embeddings": 24},
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=16, reduce_dim=8, extract_layers=[0, 1], decoder_num_attention_heads=2,
        decoder_intermediate_size=16, conditional_layer=0,
    )  # fmt: skip
    processor = CLIPSegProcessor(ViTImageProcessorPil(size={"height": 64, "width": 64}), tokenizer)
    return CLIPSegForImageSegmentation(config).eval(), processor


def saved(parts: tuple[Any, Any], folder: Path) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder


def test_grounding_dino_and_sam_find_masks_of_every_class(tmp_path: Path) -> None:
    detector, masker = saved(a_detector(), tmp_path / "detector"), saved(a_sam(), tmp_path / "sam")
    segmenter = load_open_segmenter("grounded", CLASSES, detector=detector, masker=masker, device="cpu")
    assert isinstance(segmenter, GroundedSegmenter)
    assert isinstance(segmenter._detector, GroundingDinoForObjectDetection)
    assert isinstance(segmenter._masker, SamModel)
    assert segmenter.class_names() == CLASSES
    segmenter._box_score = 0.0  # random weights are sure of nothing
    batch = images(3)
    found = segmenter.segment(batch)
    assert found.masks.shape == (3, 3, 48, 64)
    assert found.masks.any()
    assert ((found.scores > 0) == found.masks.any(3).any(2)).all()
    assert found.label_map().shape == (3, 48, 64)
    alone = segmenter.segment(batch[1:2])
    torch.testing.assert_close(found.scores[1:2], alone.scores)
    assert torch.equal(found.masks[1:2], alone.masks)
    segmenter._box_score = 1.0
    nothing = segmenter.segment(batch)
    assert not nothing.masks.any()
    assert not nothing.scores.any()
    assert (nothing.label_map() == -1).all()


def test_sam_2_gives_the_masks_of_sam() -> None:
    pytest.importorskip("torchvision", reason="the processor of SAM 2 needs it")
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

    torch.manual_seed(0)
    backbone = {"hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1]}
    stages = {
        "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 4, 4, 2], "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [4, 4],
    }  # fmt: skip
    model = Sam2Model(
        Sam2Config(
            vision_config={
                "backbone_config": {"model_type": "sam2_hiera_det_model", **backbone, **stages},
                "backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
                "fpn_hidden_size": 32,
            },
            prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16},
            mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16},
        )
    ).eval()  # fmt: skip
    processor = Sam2Processor(Sam2ImageProcessor(size={"height": 64, "width": 64}), target_size=64)
    segmenter = GroundedSegmenter(CLASSES, *a_detector(), model, processor, box_score=0.0)
    found = segmenter.segment(images(2))
    assert found.masks.shape == (2, 3, 48, 64)
    assert found.masks.any()


class Finds:
    """A detector of two queries: the first sees the second class on the left half, the other nothing."""

    config = SimpleNamespace(max_text_len=32)
    device = torch.device("cpu")

    def eval(self) -> "Finds":
        return self

    def requires_grad_(self, _: bool) -> "Finds":
        return self

    def __call__(self, input_ids: Tensor, **_: Any) -> Any:
        self.read = input_ids[0].tolist()
        logits = torch.full((1, 2, 32), -torch.inf)
        logits[:, :, : len(self.read)] = -6.0
        logits[0, 0, 3], logits[0, 0, 4] = 3.0, 1.0  # [CLS] cat . red house . sea . [SEP]
        return SimpleNamespace(logits=logits, pred_boxes=torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.5, 0.5, 1, 1]]]))


class Cuts(Finds):
    """A masker that gives back its boxes as masks."""

    def __call__(self, input_boxes: Tensor, **_: Any) -> Any:
        masks = torch.zeros(1, input_boxes.shape[1], 1, 48, 64, dtype=torch.bool)
        for i, (left, upper, right, lower) in enumerate(input_boxes[0].round().int().tolist()):
            masks[0, i, 0, upper:lower, left:right] = True
        return SimpleNamespace(pred_masks=masks)


def test_a_box_becomes_the_mask_of_the_class_whose_words_it_fits() -> None:
    cutter = SimpleNamespace(post_process_masks=lambda masks, **_: list(masks))
    finds = Finds()

    class Cutter:
        def __call__(self, images: Image.Image, input_boxes: Any, return_tensors: str) -> Any:  # noqa: ARG002
            return {"input_boxes": torch.tensor(input_boxes)}

        post_process_masks = staticmethod(cutter.post_process_masks)

    segmenter = GroundedSegmenter(CLASSES, finds, a_detector()[1], Cuts(), Cutter())
    masks, scores = segmenter.segment(images(1))
    assert finds.read == [101, 1030, 1012, 1031, 1032, 1012, 1033, 1012, 102]
    assert masks[0].any(2).any(1).tolist() == [False, True, False]
    assert masks[0, 1, :, :32].all()
    assert not masks[0, 1, :, 32:].any()
    expected = (torch.tensor(3.0).sigmoid() + torch.tensor(1.0).sigmoid()) / 2
    torch.testing.assert_close(scores[0], torch.tensor([0.0, float(expected), 0.0]))


def test_classes_are_read_as_many_together_as_fit() -> None:
    tokenizer = bert_tokenizer()
    texts = list(_texts(CLASSES, tokenizer, 7))
    assert [(text.words, text.first) for text in texts] == [("cat. red house.", 0), ("sea.", 2)]
    for text in texts:
        ids = tokenizer(text.words)["input_ids"]
        assert len(ids) <= 7
        named = CLASSES[text.first : text.first + len(text.spans)]
        assert [tokenizer.decode(ids[first:last]) for first, last in text.spans] == list(named)
    with pytest.raises(ModelError, match="'red house' is too long for the detector"):
        list(_texts(CLASSES, tokenizer, 4))


def test_boxes_that_are_one_are_taken_once() -> None:
    corners = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [5, 5, 15, 15], [20, 20, 30, 30], [20, 21, 30, 30]])
    assert _apart(corners) == [0, 2, 3]
    assert _apart(corners[:0]) == []


def test_clipseg_looks_once_and_sees_what_it_sees_class_by_class(tmp_path: Path) -> None:
    model, processor = a_clipseg()
    folder = saved((model, processor), tmp_path / "clipseg")
    segmenter = load_open_segmenter("clipseg", CLASSES, clipseg=folder, device="cpu")
    assert isinstance(segmenter, ClipSegmenter)
    image = images(1)[0]
    looks: list[int] = []
    handle = segmenter._model.clip.vision_model.register_forward_hook(lambda *_: looks.append(1))
    logits = segmenter._logits(image)
    handle.remove()
    assert looks == [1]
    for i, name in enumerate(CLASSES):
        with torch.no_grad():
            inputs = processor(text=[name], images=[image], return_tensors="pt", padding=True)
            alone = model(**inputs).logits
        torch.testing.assert_close(logits[i], alone.view(logits[i].shape), rtol=1e-4, atol=1e-5)


def test_a_pixel_is_of_the_most_probable_class_if_that_is_probable_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter = ClipSegmenter(CLASSES, *a_clipseg(), probability=0.6)
    p = torch.tensor([[[0.9, 0.2], [0.1, 0.1]], [[0.7, 0.8], [0.5, 0.1]], [[0.1, 0.1], [0.4, 0.65]]])
    monkeypatch.setattr(segmenter, "_logits", lambda _: p.logit())
    found = segmenter.segment(images(2, (2, 2)))
    assert found.label_map().tolist() == [[[0, 1], [-1, 2]]] * 2
    torch.testing.assert_close(found.scores, torch.tensor([[0.9, 0.8, 0.65]] * 2))


def test_classes_are_the_tags_and_the_prompts_own_words() -> None:
    prompts = ["A cat in the snow", "a whale, and 2 whales of the sea", "the whale with a lighthouse", "lighthouse"]
    found = classes_of(prompts, n_words=2)
    assert found[: len(TAGS)] == TAGS
    assert found[len(TAGS) :] == ("whale", "lighthouse")
    assert classes_of(prompts, ("cat", "cat"), 9) == ("cat", "whale", "lighthouse", "snow", "whales", "sea")
    assert len(set(TAGS)) == len(TAGS)
    assert set(BACKGROUND_TAGS) <= set(TAGS)


def test_invalid_kinds_and_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no open-vocabulary segmenter 'sam'; there are grounded and clipseg"):
        load_open_segmenter("sam", CLASSES)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"(?s)nothing could not be loaded.*CLIPSegForImageSegmentation"):
        load_open_segmenter("clipseg", CLASSES, clipseg=tmp_path / "nothing")
    folder = saved(a_clipseg(), tmp_path / "clipseg")
    for classes in ((), ("cat", "cat"), ("cat", " ")):
        with pytest.raises(ValueError, match="Classes need distinct, non-empty names"):
            load_open_segmenter("clipseg", classes, clipseg=folder, device="cpu")
    segmenter = load_open_segmenter("clipseg", CLASSES, clipseg=folder, device="cpu")
    with pytest.raises(ImageError, match="their sizes: 64 x 32 and 64 x 48"):
        segmenter.segment([*images(1), *images(1, (64, 32))])
    assert "/" in CLIPSEG
