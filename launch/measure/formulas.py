"""What the measured numbers mean, in words, for reports. Needs no PyTorch."""

TURNS = (
    "Rows of one shape, type and number of images took turns, a few steps each in every round: "
    "median (quartiles) over rounds; ratio: to the first of these rows, round by round."
)
DRAWING = (
    "Codes only, with guidance (two rows per image). first s: seconds for the first image of a "
    "process, in which it compiles or records."
)
FLOOR = (
    "floor = max(bytes / bandwidth, operations / rate) for one step. bytes: weights (all parameters "
    "except embedding tables, of which a step reads single rows) + rows x cache entries before the "
    "step x size of an entry's keys and values; operations: rows x those of one window in a "
    "teacher-forced pass over the image (torch's FlopCounterMode: 2 for a multiplication and an "
    "addition). bandwidth: bytes that a large copy reads and writes per second; rate: operations "
    "per second of a large matrix product in the same type."
)
MFU = (
    "MFU = 3 x operations of a forward pass / seconds / rate: a backward pass counts as two forward "
    "passes. Operations repeated by gradient checkpointing or spent on own drafts are not counted."
)
TRAINING = (
    "fp32 weights (bf16: under autocast); forward, backward and AdamW over all parameters; naive: "
    "a loss that holds all logits at once, and blocks of plain operations; compiled: compiled "
    "blocks, without the time of the first step."
)
ESTIMATE = (
    "state GB: weights and optimizer after a step; estimate GB: the peak that `--check` expects, "
    "without image tokenizer, text encoder and the tenth that it adds."
)
MEMORY = (
    "Peak memory is that of a fresh process. On a GPU: all its tensors. On a CPU (Linux): the most "
    "that the process held, minus what it held before the work (Python and libraries); freed memory "
    "is returned at once (MALLOC_MMAP_THRESHOLD_). State: weights and optimizer."
)
SCALING = "fp32, guided, --speed auto; drawing: seconds for all images of a point."
FITS = (
    "cost = a x work^exponent, by least squares on logarithms; residual: root mean square of the "
    "remaining differences, in percent."
)
