/* counting INDEX: increment an NV counter as fast as the TPM answers, and say each value that is then read from it on
 * port 0xe9 (QEMU's isa-debugcon), a line each, so that whoever stands outside sees and times every one.
 * Ends with SIGTERM (exit 0, "N increments") or at the first answer that is not success (exit 1, the answer's code). */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <unistd.h>

#define PORT 0xe9
#define RC_RETRY 0x922 /* Part 2, 6.6.3: the TPM did not do it and wants it again */

static volatile sig_atomic_t ended;
static void end(int number) { (void)number; ended = 1; }
static void put16(uint8_t *at, uint16_t value) { at[0] = value >> 8; at[1] = value & 255; }
static void put32(uint8_t *at, uint32_t value) { put16(at, value >> 16); put16(at + 2, value & 65535); }

/* One command with an empty password for its one session: NV_Increment (0x134) or NV_Read (0x14e), Part 3, 31. */
static uint32_t command(int tpm, uint32_t code, uint32_t index, uint8_t *answer, size_t size) {
    uint8_t packet[35];
    size_t length = code == 0x134 ? 31 : 35;
    put16(packet, 0x8002);
    put32(packet + 2, length);
    put32(packet + 6, code);
    put32(packet + 10, index);
    put32(packet + 14, index);
    put32(packet + 18, 9);
    put32(packet + 22, 0x40000009);
    memset(packet + 26, 0, 5);
    put16(packet + 31, 8);
    put16(packet + 33, 0);
    for (;;) {
        if (write(tpm, packet, length) != (ssize_t)length || read(tpm, answer, size) < 10) {
            perror("/dev/tpmrm0");
            exit(2);
        }
        uint32_t rc = (uint32_t)answer[6] << 24 | answer[7] << 16 | answer[8] << 8 | answer[9];
        if (rc != RC_RETRY) return rc;
    }
}

int main(int count, char **arguments) {
    if (count != 2) return 2;
    uint32_t index = strtoul(arguments[1], NULL, 0), rc;
    int tpm = open("/dev/tpmrm0", O_RDWR);
    if (tpm < 0 || ioperm(PORT, 1, 1) != 0) {
        perror("counting");
        return 2;
    }
    signal(SIGTERM, end);
    uint8_t answer[4096];
    unsigned long done = 0;
    while (!ended) {
        if ((rc = command(tpm, 0x134, index, answer, sizeof answer)) == 0)
            rc = command(tpm, 0x14e, index, answer, sizeof answer);
        if (rc != 0) {
            printf("after %lu increments: %#x\n", done, rc);
            return 1;
        }
        uint64_t value = 0;
        for (int i = 16; i < 24; i++) value = value << 8 | answer[i];
        char line[32];
        int length = snprintf(line, sizeof line, "%llu\n", (unsigned long long)value);
        for (int i = 0; i < length; i++) outb(line[i], PORT);
        done++;
    }
    printf("%lu increments\n", done);
    return 0;
}
