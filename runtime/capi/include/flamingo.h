/* flamingoc's runtime for C and C++. Written by cbindgen from src/ffi.rs; do not edit.
 *
 * Pointers that functions return belong to the caller, who gives them back to the matching _free. A function that can
 * fail takes `error`: where it is not NULL, it is set to a message to be freed with flamingo_string_free, or to NULL.
 * A model may be used from several threads, a session from one at a time.
 */

#ifndef FLAMINGO_H
#define FLAMINGO_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

/*
 A model opened from an artifact.
 */
typedef struct FlamingoModel FlamingoModel;

/*
 A conversation with a model.
 */
typedef struct FlamingoSession FlamingoSession;

/*
 Gets text as it is generated, UTF-8 and ended by NUL, with the pointer that was given beside the function; false ends
 the generation.
 */
typedef bool (*FlamingoOnText)(const char *text, void *user);

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Opens an artifact. `options`, JSON or NULL: `backend`, `threads`, `kv`, `verify`, as the options of `flamingoc run`.
 NULL on error.

 # Safety
 Strings are NULL or ended by NUL; `error` is NULL or valid for a write.
 */
FlamingoModel *flamingo_model_open(const char *path,
                                   const char *options,
                                   char **error);

/*
 Gives a model back; its sessions stay usable.

 # Safety
 NULL, or a model of this library that was not given back.
 */
void flamingo_model_free(FlamingoModel *model);

/*
 An empty conversation. NULL on error.

 # Safety
 `model` is one of this library; `error` is NULL or valid for a write.
 */
FlamingoSession *flamingo_session_new(const FlamingoModel *model, char **error);

/*
 A conversation that has the same so far and goes its own way; the common part lies in memory once. NULL for NULL.

 # Safety
 `session` is NULL or one of this library.
 */
FlamingoSession *flamingo_session_fork(const FlamingoSession *session);

/*
 Gives a conversation back.

 # Safety
 NULL, or a session of this library that was not given back.
 */
void flamingo_session_free(FlamingoSession *session);

/*
 Appends a turn and reads it: `{"segments": [{"image": "a.jpg"}, {"text": "Question: …"}]}`, as a prompt file of
 `flamingoc run`; paths are relative to the working directory. After an error the session is as before.

 # Safety
 `session` is one of this library, used by no other thread; `turn` is NULL or ended by NUL; `error` is NULL or valid
 for a write.
 */
bool flamingo_session_append(FlamingoSession *session,
                             const char *turn,
                             char **error);

/*
 Generates an answer, which becomes part of the conversation. `options`, JSON or NULL: `max_new_tokens`, `temperature`,
 `top_k`, `top_p`, `repetition_penalty`, `no_repeat_ngram`, `seed`, `num_beams`, `length_penalty`, `stop` (list of texts), `timeout_ms`.
 Returns what `flamingoc run --json` prints, to be freed with [`flamingo_string_free`]; NULL on error.

 # Safety
 `session` is one of this library, used by no other thread; `options` is NULL or ended by NUL; `on_text` is NULL or may
 be called with `user` until this function returns; `error` is NULL or valid for a write.
 */
char *flamingo_session_generate(FlamingoSession *session,
                                const char *options,
                                FlamingoOnText on_text,
                                void *user,
                                char **error);

/*
 Tokens of the conversation so far: a mark for [`flamingo_session_rewind`]. 0 for NULL.

 # Safety
 `session` is NULL or one of this library.
 */
size_t flamingo_session_mark(const FlamingoSession *session);

/*
 Forgets everything since a mark.

 # Safety
 `session` is one of this library, used by no other thread; `error` is NULL or valid for a write.
 */
bool flamingo_session_rewind(FlamingoSession *session, size_t mark, char **error);

/*
 Frees a string that this library returned.

 # Safety
 NULL, or a string of this library that was not freed.
 */
void flamingo_string_free(char *text);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FLAMINGO_H */
