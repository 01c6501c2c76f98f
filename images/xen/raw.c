/* raw DEVICE HEX: sends one command to a TPM and prints its answer in hexadecimal. Ends with 0 if there was an answer,
   whatever its code says. For TPM 1.2, whose tools need a daemon. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static unsigned char command[4096], answer[4096];

int main(int count, char **words)
{
    size_t size = count == 3 ? strlen(words[2]) / 2 : 0;
    if (size == 0 || size > sizeof command) {
        fprintf(stderr, "usage: raw DEVICE HEX\n");
        return 2;
    }
    for (size_t i = 0; i < size; i++)
        if (sscanf(words[2] + 2 * i, "%2hhx", command + i) != 1) {
            fprintf(stderr, "no hexadecimal digits: %s\n", words[2] + 2 * i);
            return 2;
        }
    int tpm = open(words[1], O_RDWR);
    ssize_t got = tpm < 0 || write(tpm, command, size) != (ssize_t)size ? -1 : read(tpm, answer, sizeof answer);
    if (got < 0) {
        fprintf(stderr, "%s: %s\n", words[1], strerror(errno));
        return 1;
    }
    for (ssize_t i = 0; i < got; i++)
        printf("%02x", answer[i]);
    printf("\n");
    return 0;
}
