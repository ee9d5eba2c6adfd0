// The order in which the tiles of a matrix are computed.
#pragma once
#include "../ptx/target.h"

struct TilePlace {
    int m, n;  // first row and column
};

// Tile number `index` of m_tiles × n_tiles, in an order that keeps neighbours in the L2: columns of eight row tiles are
// finished before the next column begins.
DEVICE TilePlace find_tile(int index, int m_tiles, int n_tiles, int tile_m, int tile_n) {
    constexpr int group = 8;
    const int tiles_per_group = group * n_tiles;
    const int first = index / tiles_per_group * group, rows = min(group, m_tiles - first);
    const int inside = index % tiles_per_group;
    return {(first + inside % rows) * tile_m, inside / rows * tile_n};
}
