/* Continues a prompt with a model that `shoal export-c MODEL -o DIRECTORY` wrote, and prints the ids of the tokens.
 *
 *     cc -std=c11 -O2 -IDIRECTORY generate.c DIRECTORY/model.c libshoal.so -Wl,-rpath,'$ORIGIN' -o generate
 *     ./generate DIRECTORY COUNT TEMPERATURE SEED TOKEN...
 *
 * Tokens are the model's: docs/embedding-c.md says how text becomes tokens. Temperature 0 is greedy. */
#define _POSIX_C_SOURCE 200809L
#include "model.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHECK(holds, ...) ((holds) ? (void)0 : (fprintf(stderr, "generate: " __VA_ARGS__), fputs("\n", stderr), exit(1)))

/* A file of weights in memory, as it was exported. */
static const char *mapped(const char *directory, const model_file *expected) {
  char path[4096], hash[65];
  struct stat found;
  snprintf(path, sizeof path, "%s/%s", directory, expected->name);
  const int file = open(path, O_RDONLY);
  CHECK(file >= 0 && !fstat(file, &found), "%s cannot be opened: export the model again", path);
  CHECK((uint64_t)found.st_size == expected->bytes, "%s has another size: export the model again", path);
  const char *data = mmap(NULL, expected->bytes, PROT_READ, MAP_SHARED, file, 0);
  CHECK(data != MAP_FAILED, "%s cannot be mapped", path);
  close(file);
  shoal_sha256(data, expected->bytes, hash); /* an app may do this once, after its download */
  CHECK(!strcmp(hash, expected->sha256), "%s was altered: export the model again", path);
  return data;
}

static int is_end(int32_t token) {
  for (int i = 0; i < MODEL_ENDS; i++)
    if (token == model_ends[i]) return 1;
  return 0;
}

int main(int argc, char **argv) {
  CHECK(argc > 5, "usage: generate DIRECTORY COUNT TEMPERATURE SEED TOKEN...");
  CHECK(!strcmp(shoal_source_hash(), MODEL_SOURCES), "libshoal is of another version than the export");
  const char *data[MODEL_FILES], *threads = getenv("SHOAL_THREADS");
  for (int i = 0; i < MODEL_FILES; i++) data[i] = mapped(argv[1], &model_files[i]);
  const shoal_program *program = model_program(data);

  char error[512] = "out of memory";
  shoal_pool *pool = shoal_pool_open(threads ? atoi(threads) : 2);
  shoal_executor *executor = NULL;
  CHECK(pool && !shoal_open(program, pool, SHOAL_ISA_AUTO, &executor, error, sizeof error), "%s", error);

  int32_t length = argc - 5, run = 0; /* tokens that are known, and positions whose keys and values are in the pages */
  const int32_t last = length + atoi(argv[2]), pages = (last + SHOAL_PAGE - 1) / SHOAL_PAGE;
  CHECK(last >= length && last <= MODEL_CONTEXT, "the context holds %d tokens", MODEL_CONTEXT);
  int32_t *tokens = calloc((size_t)last + 1, sizeof *tokens), drawn;
  void **page = calloc((size_t)MODEL_STATES * (size_t)pages, sizeof *page);
  CHECK(tokens && page, "out of memory");
  for (int32_t i = 0; i < length; i++) tokens[i] = atoi(argv[5 + i]);
  for (int32_t i = 0; i < MODEL_STATES * pages; i++)
    CHECK(page[i] = calloc(1, model_page_bytes[i / pages]), "out of memory");

  shoal_sequence sequence = {.pages = page, .pages_stride = pages, .history = tokens};
  sequence.sampling = (shoal_sampling){.temperature = strtof(argv[3], NULL), .seed = strtoull(argv[4], NULL, 10),
                                       .top_p = 1, .repetition_penalty = 1};
  float *no_rows[MODEL_OUTPUTS] = {NULL}; /* neither logits nor embeddings */
  shoal_batch batch = {.sequences = &sequence, .n_sequences = 1, .outputs = no_rows, .drawn = &drawn};
  while (length < last) {
    sequence.first = run;
    sequence.rows = length - run < program->max_rows ? length - run : program->max_rows;
    sequence.wanted = sequence.sample = run + sequence.rows == length;
    batch.tokens = tokens + run;
    CHECK(!shoal_run(executor, &batch, error, sizeof error), "%s", error);
    run += sequence.rows;
    if (run < length) continue; /* more of the prompt */
    if (is_end(drawn)) break;
    printf("%d\n", tokens[length++] = drawn);
    fflush(stdout);
  }
  shoal_close(executor);
  shoal_pool_close(pool);
  return 0;
}
