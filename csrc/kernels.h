/* The whole interface of libshoal. The C files include it through common.h and cffi parses it as it stands, so it
 * holds no directives. It is also the one place of the layout constants, the op table and the status codes.
 * Semantics of every op: csrc/scalar.c and docs/numerics.md. All ranges are half-open. */

enum shoal_layout {
  SHOAL_NUMERICS = 2, /* version of the definition: a change of any bit of any result raises it */
  SHOAL_LAYOUT = 1,   /* version of the packed weight layout */
  SHOAL_PANEL = 16,   /* output rows of one panel of packed weights */
  SHOAL_QUAD = 4,     /* consecutive inputs of a row that stand side by side in a panel */
  SHOAL_GROUP = 32,   /* inputs that share a scale */
  SHOAL_LANES = 16,   /* lanes of every float reduction */
  SHOAL_PAGE = 256,   /* positions in a page of keys and values, and in one block of the softmax */
  SHOAL_CHUNK = 64,   /* positions of a page whose keys stand side by side */
  SHOAL_MAX_PARTS = 4, /* weights that one matmul joins into one output */
  SHOAL_MAX_HEAD_DIM = 512, /* columns of an attention head */
  SHOAL_PART_BYTES = 1048576 /* what several threads leave of one row's attention until they have joined it, at most */
};

enum shoal_status {
  SHOAL_OK = 0,
  SHOAL_E_PROGRAM = 1,   /* the program or the batch is inconsistent: the message says where */
  SHOAL_E_MEMORY = 2,    /* out of memory */
  SHOAL_E_NONFINITE = 3, /* NaN or infinity among the inputs or in the logits */
  SHOAL_E_CANCELLED = 4, /* the caller's flag was set between two ops */
  SHOAL_E_ISA = 5        /* this CPU has not the instruction set asked for */
};

enum shoal_isa {
  SHOAL_ISA_AUTO = 0,
  SHOAL_ISA_SCALAR = 1,
  SHOAL_ISA_AVX2 = 2,
  SHOAL_ISA_AVXVNNI = 3,
  SHOAL_ISA_AVX512 = 4,
  SHOAL_ISA_NEON = 5,
  SHOAL_ISA_NEON_DOT = 6,
  SHOAL_ISA_NEON_I8MM = 7
};

enum shoal_type { SHOAL_F32 = 0, SHOAL_Q8 = 1, SHOAL_F16 = 2, SHOAL_F64 = 3, SHOAL_Q4 = 4 };

/* Rows of a buffer: every row of the batch, or only the rows whose logits are wanted. */
enum shoal_domain { SHOAL_ALL_ROWS = 0, SHOAL_WANTED_ROWS = 1 };

enum shoal_activation { SHOAL_SILU = 0, SHOAL_GELU_TANH = 1 };

/* in, out, angles and state are those of shoal_op, w0 to w3 its weights; other lower-case names are its parameters. What a
 * kind reads and writes, and what it allows, is one row of the table in ops.c. */
enum shoal_op_kind {
  SHOAL_OP_EMBED = 0,    /* out f32[cols] = w0[token] */
  SHOAL_OP_ANGLES = 1,   /* out f32[2 * half] = cos, then sin, of position * w0 (f64[half]) */
  SHOAL_OP_NORM = 2,     /* out (f32 or q8) = rms_norm(in, epsilon) * w0; gathers when out holds wanted rows only */
  SHOAL_OP_QUANTISE = 3, /* out q8 = in f32 */
  SHOAL_OP_MATMUL = 4,   /* out f32 = in @ [w0; w1; ...]^T + [b0; b1; ...]; accumulate = 1: added to what out holds */
  SHOAL_OP_ROPE = 5,     /* in place: each of the first `heads` heads of head_dim columns of out f32 is rotated by angles,
                          * the first 2 * half columns of the head */
  SHOAL_OP_STORE = 6,    /* keys at column `key` of in, values at column `value`, into the pages of the state */
  SHOAL_OP_ATTEND = 7,   /* out f32 = attention of the `heads` query heads at `column` of in; scores times `scale` */
  SHOAL_OP_GATE = 8,     /* out (f32 or q8) = activation(in[:cols]) * in[cols:] */
  SHOAL_OP_SAMPLE = 9,   /* draws one token a sequence from in (logits, wanted rows) */
  SHOAL_OP_HEAD_NORM = 10 /* in place: each of the `heads` heads of head_dim columns from `column` of out f32 on becomes
                           * rms_norm(head, epsilon) * w0 */
};

typedef struct {
  int32_t type;   /* SHOAL_F32 or SHOAL_Q8 (int8 with one f32 scale a group) */
  int32_t cols;   /* columns, unpadded */
  int32_t domain; /* enum shoal_domain */
} shoal_buffer;

/* A matrix [rows][cols] or a vector (rows = 1).
 * SHOAL_F32, SHOAL_F64: row-major. SHOAL_Q8: data is int8 [panels][cols padded to a group / 4][16][4], scales is
 * fp16 [panels][groups][16]; rows and columns beyond the matrix hold zeros.
 * SHOAL_Q4: data is [panels][groups][4][16][4] bytes: byte [p][g][j][o][i] holds, of output 16 p + o, input
 * 32 g + 4 j + i in its low four bits and input 32 g + 16 + 4 j + i in its high ones, both unsigned; scales as above.
 * A weight is (q - 8) * scale; with mins, fp16 as scales, it is q * scale + min. */
typedef struct {
  const void *data;
  const uint16_t *scales;
  const uint16_t *mins; /* SHOAL_Q4, or NULL */
  uint64_t data_bytes;
  uint64_t scales_bytes;
  uint64_t mins_bytes;
  int32_t type;
  int32_t rows;
  int32_t cols;
} shoal_weight;

/* Keys and values of one layer. A page is, for each kv head, keys [256 / 64][head_dim][64] then values [256][head_dim].
 * SHOAL_Q8: four times data and scales of a SHOAL_Q8 matrix, keys [64][head_dim]; then four times the data of another,
 * values [head_dim][64], and in the place of its scales one f32 a position. */
typedef struct {
  int32_t type; /* SHOAL_F32, SHOAL_F16 or SHOAL_Q8 */
  int32_t kv_heads;
  int32_t head_dim; /* a multiple of 16 */
} shoal_state;

/* One operation. Parameters that its kind does not name above are ignored. */
typedef struct {
  int32_t kind;
  int32_t out;    /* buffer, or -1 */
  int32_t in;     /* buffer, or -1 */
  int32_t angles; /* buffer, or -1 */
  int32_t state;  /* state, or -1 */
  int32_t n_weights;
  int32_t weights[4];
  int32_t n_biases; /* 0, or n_weights */
  int32_t biases[4]; /* weight f32[rows of weights[i]], or -1: no bias */
  int32_t accumulate; /* 0 or 1 */
  int32_t activation; /* enum shoal_activation */
  int32_t column, heads, head_dim;
  int32_t key, value;
  float epsilon, scale;
} shoal_op;

typedef struct {
  const shoal_op *ops;
  const shoal_buffer *buffers;
  const shoal_weight *weights;
  const shoal_state *states;
  const int32_t *inputs;  /* f32 buffers that the caller fills before a run */
  const int32_t *outputs; /* f32 buffers that the caller gets after it */
  int32_t n_ops, n_buffers, n_weights, n_states, n_inputs, n_outputs;
  int32_t max_rows;   /* of one batch */
  int32_t max_wanted; /* of one batch */
} shoal_program;

typedef struct {
  float temperature; /* 0: greedy */
  int32_t top_k;     /* 0: off */
  float top_p;       /* 1: off */
  float min_p;       /* 0: off */
  float repetition_penalty; /* 1: off */
  uint64_t seed;
  float presence_penalty;  /* 0: off */
  float frequency_penalty; /* 0: off */
  int32_t n_biases;
  const int32_t *biased;  /* [n_biases] token ids, each once */
  const float *biases;    /* [n_biases]: added to their logits */
  const uint8_t *allowed; /* bit t % 8 of byte t / 8: whether token t may be drawn. NULL: all may */
} shoal_sampling;

/* One sequence's run of consecutive rows. */
typedef struct {
  int32_t rows;
  int32_t first;  /* absolute position of the first row */
  int32_t wanted; /* how many of the last rows want logits: 0, 1 or rows */
  int32_t sample; /* from how many of the last rows a token is drawn: 0, 1 or wanted */
  void *const *pages;    /* [n_states][pages_stride]: page p of state s holds positions [256 p, 256 p + 256) */
  int64_t pages_stride;
  const int32_t *history; /* token ids at positions [0, first + rows): read when there is a penalty */
  shoal_sampling sampling;
  int32_t reported; /* a row's log-probabilities that are wanted: 0, or of its token and of the reported - 1 likeliest */
  const int32_t *given; /* [wanted]: tokens that are reported where sample is 0; NULL: none */
} shoal_sequence;

typedef struct {
  const shoal_sequence *sequences;
  int32_t n_sequences;
  const int32_t *tokens;      /* [sum of rows]: read by EMBED */
  const float *const *inputs; /* per input buffer: [rows][cols], dense */
  float *const *outputs;      /* per output buffer: [rows or wanted rows][cols], dense. NULL: not asked for, and an op that
                                 writes it for nothing else is left out */
  int32_t *drawn;             /* [wanted rows]: the drawn or given token, or -1 */
  int32_t most_reported;      /* the most that a sequence wants reported; if it is 0, the next two may be NULL */
  int32_t *reports;           /* [wanted rows][most_reported]: the drawn or given token, then the likeliest ones */
  float *logprobs;            /* [wanted rows][most_reported]: theirs */
  const volatile int32_t *cancel; /* the run ends between two ops once this is not 0; may be NULL */
  uint64_t *op_ns;            /* [n_ops] nanoseconds, or NULL */
} shoal_batch;

typedef struct shoal_pool shoal_pool;
typedef struct shoal_executor shoal_executor;

/* Instruction sets of this build and CPU. */
int32_t shoal_isa_best(void);
int32_t shoal_isa_available(int32_t isa);
const char *shoal_isa_name(int32_t isa);

/* SHA-256 of the C sources that this library was built from, in hexadecimal. */
const char *shoal_source_hash(void);

/* SHA-256 of some memory, in hexadecimal: 64 letters and a 0. For programs that check a model's files themselves. */
void shoal_sha256(const void *data, uint64_t bytes, char *hexadecimal);

/* Threads: the caller is one of them. NULL when out of memory. */
shoal_pool *shoal_pool_open(int32_t threads);
void shoal_pool_close(shoal_pool *pool);

/* Checks the program, copies its tables, plans the workspace. The weights' memory stays the caller's and must outlive it.
 * On failure *executor is NULL and error (of error_bytes) says what does not hold. */
int32_t shoal_open(const shoal_program *program, shoal_pool *pool, int32_t isa, shoal_executor **executor, char *error,
                   int32_t error_bytes);
void shoal_close(shoal_executor *executor);
uint64_t shoal_workspace_bytes(const shoal_executor *executor);

/* Runs every op once for the batch. Sequences of one batch must be distinct. On failure error says why; the pages of the
 * batch's positions may have been written, nothing before them. */
int32_t shoal_run(shoal_executor *executor, const shoal_batch *batch, char *error, int32_t error_bytes);

/* Waits until one of the n (at most 64) sockets or pipes can be read, at most wait_ns nanoseconds (rounded up to milliseconds
 * where it sleeps), for ever if that is below 0. Looks again and again for spin_ns, then sleeps. How many can be read,
 * plus 65536 if another program had this core for a while, so that looking is no use; below 0: the system refused. */
int32_t shoal_wait(const int32_t *handles, int32_t n, int64_t spin_ns, int64_t wait_ns);

/* Watches a mapping of an open file that may become shorter while it is read. An access behind the file's new end would end
 * the process with SIGBUS; in a mapping that is watched it reads zeros. Other SIGBUS are passed on to the handler that was
 * there before. The number of the watch; -1: there are too many, or the system refuses. */
int32_t shoal_watch(const void *first, uint64_t bytes, uint64_t page_bytes, int32_t file);
void shoal_unwatch(int32_t number);
/* The index of the first of n watches whose file has become shorter; -1: none has. */
int32_t shoal_shrunk(const int32_t *numbers, int32_t n);

/* Peaks, to hold an executor against; on all threads of the pool. Nanoseconds, or 0: the pool is busy, or the arguments
 * make no sense.
 * Reads the n pieces of memory `passes` times, by whole lines of 64 bytes, each thread long stretches of them; with
 * `fetch`, lines are fetched some way ahead of their reading. seen is the exclusive or of all words read. */
uint64_t shoal_read_peak(shoal_pool *pool, const char *const *data, const uint64_t *bytes, int32_t n, int32_t passes,
                         int32_t fetch, uint64_t *seen);
/* The set's int8 dot products on registers, many `turns` of them; macs is how many multiply-accumulates those were. 0 too
 * where the set has no such loop: scalar, or not on this CPU. */
uint64_t shoal_dot_peak(shoal_pool *pool, int32_t isa, int64_t turns, uint64_t *macs);
