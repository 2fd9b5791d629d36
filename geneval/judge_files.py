"""The judge's weight files. Detector files carry the first eight digits of their SHA-256 in their
names (OpenMMLab's rule), CLIP's has all 64 in its address.
"""

from t2i.published import PublishedFile

_ADVICE = "copy it into the folder that you give as --detector-weights"

# One training run under two names: mmdet 3.x's (what GenEval's download script fetches), 2.x's.
MASK2FORMER = PublishedFile(
    title="Mask2Former Swin-S (COCO instances)",
    url="https://download.openmmlab.com/mmdetection/v3.0/mask2former/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/"
    "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
    names=(
        "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth",
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth",  # as GenEval's script renames it
    ),
    hashes=("c9d0c4f2", "743b7d99"),
    cache="geneval",
    advice=_ADVICE,
)
CLIP = PublishedFile(
    title="OpenAI CLIP ViT-L/14",
    url="https://openaipublic.azureedge.net/clip/models/"
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    names=("ViT-L-14.pt",),
    hashes=("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",),
    cache="geneval",
    advice=_ADVICE,
)
