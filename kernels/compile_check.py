"""Compile every kernel for GPUs that need not be there, and say what it takes: `python -m
kernels.compile_check`.

One line a kernel and architecture: registers a thread, bytes of spilled registers, bytes of shared
memory.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import assignment, mask_loss, mask_pool, matching_cost, region_crop, semantic_map

ARCHITECTURES = (80, 90)
SHARED = {80: 166_912, 90: 232_448}  # bytes a block may have; the compiler does not check it
# (kernel, types of what is neither an fp32 pointer nor an int32 number, constants and num_warps)
POINTERS = re.compile(
    "masks|focal|overlap|area|logits|cost|sums|weights|corners|grad|features|totals|shift|out|scores"
)
ASSIGN = {"counts": "*i32", "matched": "*i64", "bad": "*i8", "limit": "fp32"}
FINISH = {"classes": "*i32", "focal_weight": "fp32", "dice_weight": "fp32"}
LOSS = {"matched": "*i64", "labels": "*u8", "classes": "*i32"}
POOL = {"SOFT": True, **mask_pool.SAFE}
MAP = {
    "high": "*fp16",
    "low": "*fp16",
    "labels": "*i32",
    "top_scores": "*fp32",
    "scale_y": "fp32",
    "scale_x": "fp32",
}
BYTES = {"masks": "*u8", "image": "*u8", "index": "*i32", "boxes": "*i32", "crops": "*bf16"}
BYTES |= {f"{channel}_{what}": "fp32" for channel in "rgb" for what in ("scale", "shift")}
KERNELS = {
    "matching_cost.partial": (
        matching_cost.partial_kernel,
        {"labels": "*i32", "classes": "*i32"},
        matching_cost.SAFE,
    ),
    "matching_cost.finish": (
        matching_cost.finish_kernel,
        FINISH,
        {"ROWS": 16, "COLUMNS": 64, "CLASSES": 256},
    ),
    "assignment": (assignment.kernel, ASSIGN, {"COLUMNS": 128, "num_warps": 1}),
    "mask_loss.forward": (mask_loss.forward_kernel, LOSS, {"R": 4, **mask_loss.SAFE}),
    "mask_loss.backward": (mask_loss.backward_kernel, LOSS, {"R": 4, **mask_loss.SAFE}),
    "mask_loss.combine": (mask_loss.combine_kernel, {"matched": "*i64"}, {"PIXELS": 1024}),
    "mask_pool.forward": (mask_pool.forward_kernel, {"level": "fp32"}, POOL),
    "mask_pool.forward, bf16": (
        mask_pool.forward_kernel,
        {"features": "*bf16", "level": "fp32"},
        POOL,
    ),
    "mask_pool.mask_gradient": (mask_pool.mask_gradient_kernel, {}, mask_pool.MASK_GRADIENT),
    "mask_pool.feature_gradient": (
        mask_pool.feature_gradient_kernel,
        {"level": "fp32"},
        {"SOFT": True, **mask_pool.FEATURE_GRADIENT},
    ),
    "region_crop.masks": (
        region_crop.mask_kernel,
        {"masks": "*u8", "bounds": "*i32", "level": "fp32"},
        region_crop.SAFE_MASKS,
    ),
    "region_crop.crops": (
        region_crop.crop_kernel,
        BYTES,
        {"A": region_crop.CUBIC, **region_crop.SAFE_CROPS},
    ),
    "semantic_map": (
        semantic_map.kernel,
        MAP,
        {"QUERIES": 128, "SCORES": False, **semantic_map.SAFE},
    ),
}


def compile_for(name: str, architecture: int) -> dict[str, int]:
    """{"registers", "spilled", "shared"} of a kernel compiled for sm_<architecture>. Raises what
    the compiler raises.
    """
    kernel, types, launch = KERNELS[name]
    warps, constants = (
        launch.get("num_warps", 4),
        {k: v for k, v in launch.items() if k != "num_warps"},
    )
    names = kernel.arg_names
    kind = lambda n: (
        "constexpr"
        if n in constants
        else types.get(n) or ("*fp32" if POINTERS.fullmatch(n) else "i32")
    )
    signature = {n: kind(n) for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    source = ASTSource(
        kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    return {"registers": int(found["REG"]), "spilled": spilled, "shared": compiled.metadata.shared}


def main() -> None:
    for name in KERNELS:
        for architecture in ARCHITECTURES:
            print(
                name,
                f"sm_{architecture}",
                json.dumps(compile_for(name, architecture)),
                sep="\t",
                flush=True,
            )


if __name__ == "__main__":
    main()
