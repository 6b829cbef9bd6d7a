"""Classifiers of timm with random weights; the smallest variant of a family, on small images."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .entry import CLASSES, Entry, images


def build(name: str, **options: Any) -> nn.Module:
    """A model by timm's name for it."""
    import timm

    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _entry(name: str, size: int = 32, **options: Any) -> Entry:
    return Entry(name, "timm", partial(build, name, **options), partial(images, size=size))


def _fixed(name: str, size: int = 64, **options: Any) -> Entry:
    return _entry(name, size, img_size=size, **options)


ENTRIES = (
    _fixed("beit_base_patch16_224", depth=2, embed_dim=64, num_heads=2),
    _fixed("cait_xxs24_224", depth=2),
    _fixed("coat_tiny"),
    _fixed("coat_lite_tiny"),
    _fixed("convit_tiny", depth=3, local_up_to_layer=2),
    _entry("convmixer_768_32"),
    _entry("convnext_atto"),
    _entry("convnextv2_atto"),
    _fixed("crossvit_tiny_240", 240),
    _entry("cspresnet50"),
    _entry("darknet17"),
    _entry("davit_tiny", 64, embed_dims=(16, 32, 64, 128), num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1)),
    _fixed("deit_tiny_patch16_224"),
    _fixed("deit3_small_patch16_224", depth=2),
    _entry("densenet121"),
    _entry("dla34"),
    _entry("dpn48b"),
    _entry("edgenext_xx_small", 64),
    _entry("efficientformer_l1", 224, depths=(1, 1, 1, 1), embed_dims=(16, 24, 32, 48)),
    _fixed("efficientformerv2_s0", 64),
    _entry("efficientnet_b0"),
    _entry("efficientnet_lite0"),
    _entry("efficientvit_b0"),
    _fixed("eva02_tiny_patch14_224", 56, depth=2),
    _entry("fastvit_t8", 64),
    _entry("focalnet_tiny_srf", 64),
    _entry("fbnetc_100"),
    _entry("gcresnext26ts", 64),
    _entry("gcvit_xxtiny", 224),
    _entry("ghostnet_050"),
    _fixed("gmlp_ti16_224"),
    _entry("halonet26t", 256),
    _entry("hardcorenas_a"),
    _entry("hgnet_tiny", 64),
    _entry("hrnet_w18_small", 64),
    _entry("inception_next_atto"),
    _entry("lambda_resnet26t", 64),
    _fixed("levit_128s", 64),
    _fixed("maxvit_rmlp_pico_rw_256", 64),
    _fixed("coatnet_pico_rw_224", 64),
    _entry("mambaout_femto"),
    _fixed("mixer_s32_224"),
    _entry("mnasnet_small"),
    _entry("mobilenetv3_small_050"),
    _entry("mobilenetv4_conv_small"),
    _entry("mobileone_s0", 64),
    _entry("mobilevit_xxs", 64),
    _fixed("mvitv2_tiny", 64),
    _fixed("nest_tiny_jx", 64),
    _entry("nf_regnet_b0"),
    _entry("nfnet_l0", 64),
    _entry("nf_resnet26"),
    _fixed("pit_ti_224", 64),
    _entry("poolformer_s12"),
    _entry("pvt_v2_b0", 64),
    _entry("regnetx_002"),
    _entry("regnety_002"),
    _entry("regnetz_005"),
    _entry("repghostnet_050"),
    _entry("repvgg_a0"),
    _entry("repvit_m1_0", 64),
    _entry("res2net50_14w_8s"),
    _fixed("resmlp_12_224"),
    _entry("resnest14d"),
    _entry("resnet18"),
    _entry("resnet26d"),
    _entry("resnetv2_18d"),
    _entry("resnetv2_50x1_bit", 32),
    _entry("resnext50_32x4d", layers=(1, 1, 1, 1)),
    _entry("rexnet_100"),
    _entry("sebotnet33ts_256", 256),
    _entry("selecsls42"),
    _entry("seresnext26t_32x4d"),
    _entry(
        "sequencer2d_s", 64, img_size=64, layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), hidden_sizes=(4, 8, 8, 8)
    ),
    _entry("skresnet18"),
    _entry("starnet_s050", 64),
    _fixed(
        "swin_tiny_patch4_window7_224", 64, window_size=4, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)
    ),
    _fixed("swinv2_cr_tiny_224", 64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
    _fixed("swinv2_tiny_window8_256", 64, window_size=2, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
    _entry("test_vit", 160),
    _entry("tiny_vit_5m_224", 224, embed_dims=(16, 32, 32, 64), num_heads=(1, 2, 2, 4)),
    _entry("tf_efficientnetv2_b0"),
    _fixed("tnt_s_legacy_patch16_224", 64, depth=2),
    _fixed("twins_svt_small", 64, embed_dims=(16, 32, 32, 64), num_heads=(1, 2, 2, 4), depths=(1, 1, 2, 1)),
    _fixed("visformer_tiny", 64),
    _fixed("vit_tiny_patch16_224"),
    _fixed("vit_small_patch32_224", 64, depth=2, class_token=False, global_pool="avg"),
    _fixed("volo_d1_224"),
    _entry("vovnet39a", 64),
    _entry("xcit_nano_12_p16_224", 64, depth=2),
)
