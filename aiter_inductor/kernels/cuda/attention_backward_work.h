// What a block of attention_backward.cu keeps in shared memory.
//
// The build defines QK_DIM and V_DIM (elements of a head, rounded up to multiples of 64), Q_STAGES
// and DO_STAGES (blocks of queries, and of output gradients, in flight), CAUSAL, WINDOW,
// FIRST_KEYS, PACKED and FP16 (0 or 1), and SHARED_BYTES (what the launch asks for).
#pragma once

#include "ring.h"
#include "tma.h"

constexpr int KEYS = 128, QUERIES = 64;
#include "attention_backward_walk.h"

constexpr u32 READERS = 8;  // warps that multiply

// A head is cut into columns of 64 elements: 128 bytes a row, what one swizzled box may hold.
constexpr int QK_COLUMNS = QK_DIM / 64, V_COLUMNS = V_DIM / 64;
constexpr u32 KEY_COLUMN_BYTES = KEYS * 128, QUERY_COLUMN_BYTES = QUERIES * 128;
constexpr u32 K_BYTES = QK_COLUMNS * KEY_COLUMN_BYTES;
constexpr u32 V_BYTES = V_COLUMNS * KEY_COLUMN_BYTES;
constexpr u32 Q_BYTES = QK_COLUMNS * QUERY_COLUMN_BYTES;
constexpr u32 DO_BYTES = V_COLUMNS * QUERY_COLUMN_BYTES;
constexpr u32 DS_BYTES = KEYS * 128;
constexpr u32 ROW_BYTES = QUERIES * 4;  // one number a query

constexpr u32 V_AT = K_BYTES;
constexpr u32 Q_AT = V_AT + V_BYTES;
constexpr u32 DO_AT = Q_AT + Q_STAGES * Q_BYTES;
constexpr u32 DS_AT = DO_AT + DO_STAGES * DO_BYTES;
constexpr u32 LSE_AT = DS_AT + 2 * DS_BYTES;
constexpr u32 DELTA_AT = LSE_AT + Q_STAGES * ROW_BYTES;
constexpr u32 BARRIERS_AT = DELTA_AT + DO_STAGES * ROW_BYTES;

using KeyRing = Ring<1, READERS>;
using QRing = Ring<Q_STAGES, READERS>;
using DoRing = Ring<DO_STAGES, READERS>;
constexpr u32 Q_BARRIERS_AT = BARRIERS_AT + KeyRing::BYTES;
constexpr u32 DO_BARRIERS_AT = Q_BARRIERS_AT + QRing::BYTES;
static_assert(1024 + DO_BARRIERS_AT + DoRing::BYTES == SHARED_BYTES,
              "attention_backward_config.py counts otherwise");

// dQ is kept in fp32 in the order of registers: each block of queries in pieces of 32 columns.
constexpr int PIECE = 32;
constexpr int PIECE_FLOATS = QUERIES * PIECE;
