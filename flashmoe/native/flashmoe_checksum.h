/* SHA-256 and CRC-32 by the processor's own instructions: the repacking part of the interface. */
#ifndef FLASHMOE_CHECKSUM_H
#define FLASHMOE_CHECKSUM_H

#include <stdint.h>

#include "flashmoe_native.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Take n_blocks blocks of 64 bytes into a SHA-256 state (FIPS 180-4: a to h, eight words); where
 * other is given, as many of other_data into that as well. Two take little longer than one, because
 * the instructions wait for each other. FM_UNSUPPORTED where the processor has none. */
FM_EXPORT int fm_sha256(uint32_t* state, const uint8_t* data, uint32_t* other,
                        const uint8_t* other_data, int64_t n_blocks);

/* Go on from *crc, a CRC-32 as zlib has it, with n_bytes more. FM_UNSUPPORTED where the processor
 * has no instructions for it. */
FM_EXPORT int fm_crc32(const uint8_t* data, int64_t n_bytes, uint32_t* crc);

#ifdef __cplusplus
}
#endif
#endif
