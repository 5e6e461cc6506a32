/* Asks a model about pictures: answer ARTIFACT PICTURE QUESTION [QUESTION …]
 *
 *   cc -Iruntime/capi/include runtime/capi/examples/answer.c -Ltarget/release -lflamingo_capi -o answer
 *   LD_LIBRARY_PATH=target/release ./answer demo.flamingo a.png "what color ?" "what shape ?"
 */
#include <stdio.h>
#include <stdlib.h>
#include "flamingo.h"

static bool print(const char *text, void *user) {
    (void)user;
    fputs(text, stdout);
    fflush(stdout);
    return true; /* go on */
}

static int fail(char *error) {
    fprintf(stderr, "error: %s\n", error ? error : "unknown");
    flamingo_string_free(error);
    return 2;
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s ARTIFACT PICTURE QUESTION [QUESTION ...]\n", argv[0]);
        return 2;
    }
    char *error = NULL;
    FlamingoModel *model = flamingo_model_open(argv[1], NULL, &error);
    if (!model) return fail(error);
    FlamingoSession *session = flamingo_session_new(model, &error);
    if (!session) return fail(error);
    for (int i = 3; i < argc; i++) {
        /* The picture is read once; each question starts from there. A real program escapes its JSON. */
        char turn[4096];
        snprintf(turn, sizeof turn, "{\"segments\": [{\"image\": \"%s\"}, {\"text\": \"%s\"}]}", argv[2], argv[i]);
        size_t mark = flamingo_session_mark(session);
        if (!flamingo_session_append(session, turn, &error)) return fail(error);
        char *answer = flamingo_session_generate(session, "{\"max_new_tokens\": 8}", print, NULL, &error);
        if (!answer) return fail(error);
        printf("\n%s\n", answer);
        flamingo_string_free(answer);
        if (!flamingo_session_rewind(session, mark, &error)) return fail(error);
    }
    flamingo_session_free(session);
    flamingo_model_free(model);
    return 0;
}
