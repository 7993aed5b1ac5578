//go:build linux

package verity

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"
)

// The bytes for the kernel: struct dm_target_spec of linux/dm-ioctl.h, 40 bytes, and its parameters.
func TestTarget(t *testing.T) {
	t.Parallel()
	for n := range 20 {
		text := strings.Repeat("x", n)
		b := target(8000, text)
		ne := binary.NativeEndian
		if len(b)%8 != 0 || ne.Uint64(b) != 0 || ne.Uint64(b[8:]) != 8000 || int(ne.Uint32(b[20:])) != len(b) ||
			string(b[24:40]) != "verity\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" || !bytes.HasPrefix(b[40:], append([]byte(text), 0)) {
			t.Fatalf("%d characters: % x", n, b)
		}
	}
}
