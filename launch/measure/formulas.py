"""What the numbers mean, in words: for reports, without PyTorch."""

TURNS = (
    "Lines of one shape, type and number of images took turns in every round, a few steps each: "
    "median (quartiles) of the rounds; ratio: to the first line, of the same rounds."
)
DRAWING = (
    "Codes only, with guidance (two rows an image). first s: the first image of a process, in which "
    "it compiles or records."
)
FLOOR = (
    "floor = max(bytes / bandwidth, operations / rate) of a step. bytes: weights (all parameters "
    "but embedding tables, of which a step reads single rows) + rows x entries before the step x "
    "keys and values of an entry; operations: rows x those of a window in a teacher-forced pass "
    "over the image (torch's FlopCounterMode: 2 for a multiplication and an addition). bandwidth: "
    "bytes read and written by a large copy; rate: a large product of matrices in the same type."
)
MFU = (
    "MFU = 3 x operations of a forward pass / seconds / rate: backward counts as two forwards; what "
    "is computed again, or to draw own drafts, is not counted."
)
TRAINING = (
    "fp32 weights (bf16: under autocast); forward, backward and AdamW over all parameters; naive: "
    "the loss of all logits at once; compiled: with the blocks compiled, the first step not timed."
)
ESTIMATE = (
    "state GB: weights, gradients and optimizer after a step; estimate: the peak that `--check` "
    "expects, without image tokenizer, text encoder and the tenth that it adds."
)
MEMORY = (
    "Peak memory is that of a fresh process: on a GPU of all its tensors, on a CPU (Linux) what the "
    "process holds at most, less what it held before (Python and libraries), with freed memory given "
    "back at once (MALLOC_MMAP_THRESHOLD_). State: weights and optimizer."
)
SCALING = "fp32, guided, --speed auto; drawing: seconds for all images of a point."
FITS = (
    "cost = a x work^exponent, least squares on logarithms; residual: root mean square of what is "
    "left of them, in percent."
)
