"""Where the documents that figures are read from can be found."""

from __future__ import annotations

from collections.abc import Mapping

_NVIDIA = "https://www.nvidia.com/en-us/"
_CLOUD = "https://cloud.google.com/tpu/docs/"
_AWS = "https://aws.amazon.com/ec2/instance-types/"
_GITHUB = "https://github.com/"

DOCUMENTS: Mapping[str, str] = {
    "NVIDIA T4 datasheet": f"{_NVIDIA}data-center/tesla-t4/",
    "NVIDIA L4 datasheet": f"{_NVIDIA}data-center/l4/",
    "NVIDIA A10G datasheet": "https://d1.awsstatic.com/product-marketing/ec2/"
    "NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
    "NVIDIA L40S datasheet": f"{_NVIDIA}data-center/l40s/",
    "NVIDIA V100 datasheet": f"{_NVIDIA}data-center/v100/",
    "NVIDIA A100 datasheet": f"{_NVIDIA}data-center/a100/",
    "NVIDIA H100 datasheet": f"{_NVIDIA}data-center/h100/",
    "NVIDIA H200 datasheet": f"{_NVIDIA}data-center/h200/",
    # Sold in China alone; NVIDIA has no page of it. A page that quotes the sheet:
    "NVIDIA HGX H20 datasheet": "https://willitrunai.com/es/gpus/h20-96gb",
    "NVIDIA DGX A100 datasheet": f"{_NVIDIA}data-center/dgx-a100/",
    "NVIDIA DGX H100": f"{_NVIDIA}data-center/dgx-h100/",
    "NVIDIA DGX H200 datasheet": f"{_NVIDIA}data-center/dgx-h200/",
    "NVIDIA DGX B200 datasheet": f"{_NVIDIA}data-center/dgx-b200/",
    "NVIDIA DGX GB200 datasheet": f"{_NVIDIA}data-center/dgx-gb200/",
    "NVIDIA GB200 NVL72 datasheet": f"{_NVIDIA}data-center/gb200-nvl72/",
    "NVIDIA Ada architecture brief": "https://images.nvidia.com/aem-dam/Solutions/"
    "geforce/ada/nvidia-ada-gpu-architecture.pdf",
    "NVIDIA Blackwell architecture brief": "https://resources.nvidia.com/"
    "en-us-blackwell-architecture",
    "AMD Instinct MI300X datasheet": "https://www.amd.com/en/products/accelerators/"
    "instinct/mi300/mi300x.html",
    "Azure documentation, ND MI300X v5": "https://learn.microsoft.com/en-us/azure/"
    "virtual-machines/sizes/gpu-accelerated/ndmi300xv5-series",
    "Compute Engine documentation": "https://cloud.google.com/compute/docs/gpus",
    "Amazon EC2 P3": f"{_AWS}p3/",
    "Amazon EC2 P4d": f"{_AWS}p4/",
    "Amazon EC2 G5": f"{_AWS}g5/",
    "Amazon EC2 G6e": f"{_AWS}g6e/",
    "Cloud TPU documentation, TPU v2": f"{_CLOUD}v2",
    "Cloud TPU documentation, TPU v3": f"{_CLOUD}v3",
    "Cloud TPU documentation, TPU v4": f"{_CLOUD}v4",
    "Cloud TPU documentation, TPU v5e": f"{_CLOUD}v5e",
    "Cloud TPU documentation, TPU v5p": f"{_CLOUD}v5p",
    "Cloud TPU documentation, TPU v6e": f"{_CLOUD}v6e",
    "Cloud TPU documentation, TPU7x": f"{_CLOUD}tpu7x",
    "Cloud TPU documentation, TPU 7x": f"{_CLOUD}tpu7x",
    "How to Scale Your Model": "https://jax-ml.github.io/scaling-book/",
    "Jouppi et al., A Domain-Specific": "https://dl.acm.org/doi/10.1145/3360307",
    "NCCL src/graph/tuning.cc": f"{_GITHUB}NVIDIA/nccl/blob/master/src/graph/tuning.cc",
    "RCCL src/graph/tuning.cc": f"{_GITHUB}ROCm/rccl/blob/develop/src/graph/tuning.cc",
    "target_config/specs": f"{_GITHUB}openxla/xla/tree/main/xla/backends/gpu/"
    "target_config/specs",
}
"""Document, as sources of figures name it -> its address."""


def address(source: str) -> str:
    """Where the document that ``source`` names is; "" for what was seen or assumed.

    >>> address("NVIDIA H100 datasheet, SXM column: 3.35 TB/s")
    'https://www.nvidia.com/en-us/data-center/h100/'
    >>> address("assumed: a guess")
    ''
    """
    return next((url for name, url in DOCUMENTS.items() if name in source), "")
