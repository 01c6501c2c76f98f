/* timed DEVICE COUNT HEX: sends one TPM command COUNT times, prints how many nanoseconds each answer took, a line each.
   Ends with 1 at the first answer that is missing or not success. For tests/bench/bench_xen.py. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int main(int count, char **words)
{
    static unsigned char command[4096], answer[4096];
    size_t size = 0;
    if (count != 4) {
        fprintf(stderr, "usage: timed DEVICE COUNT HEX\n");
        return 2;
    }
    for (const char *next = words[3]; next[0] && next[1] && size < sizeof command; next += 2)
        if (sscanf(next, "%2hhx", &command[size++]) != 1)
            return 2;
    int tpm = open(words[1], O_RDWR);
    for (long left = atol(words[2]); left > 0; left--) {
        struct timespec before, after;
        clock_gettime(CLOCK_MONOTONIC, &before);
        if (tpm < 0 || write(tpm, command, size) != (ssize_t)size || read(tpm, answer, sizeof answer) < 10) {
            fprintf(stderr, "%s: %s\n", words[1], strerror(errno));
            return 1;
        }
        clock_gettime(CLOCK_MONOTONIC, &after);
        if (memcmp(answer + 6, "\0\0\0\0", 4) != 0) {
            fprintf(stderr, "code %02x%02x%02x%02x\n", answer[6], answer[7], answer[8], answer[9]);
            return 1;
        }
        printf("%lld\n", (after.tv_sec - before.tv_sec) * 1000000000LL + after.tv_nsec - before.tv_nsec);
    }
    return 0;
}
