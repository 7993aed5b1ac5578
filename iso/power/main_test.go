//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"slices"
	"testing"
	"testing/fstest"
)

func event(kind, code uint16, value int32) []byte {
	b := make([]byte, 16, 24)
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, code)
	return binary.NativeEndian.AppendUint32(b, uint32(value))
}

// The button going down is waited for, nothing else.
func TestPress(t *testing.T) {
	others := slices.Concat(event(evKey, 30, keyDown), event(evKey, keyPower, 0), event(0, 0, 0), event(4, keyPower, keyDown))
	if err := press(bytes.NewReader(others)); err != io.EOF {
		t.Errorf("without the button: %v", err)
	}
	rest := bytes.NewReader(append(others, append(event(evKey, keyPower, keyDown), 1, 2, 3)...))
	if err := press(rest); err != nil || rest.Len() != 3 {
		t.Errorf("%v, %d bytes left", err, rest.Len())
	}
	if err := press(bytes.NewReader(others[:30])); err != io.ErrUnexpectedEOF {
		t.Errorf("half an event: %v", err)
	}
}

// Only what the firmware calls a power button is one.
func TestButtons(t *testing.T) {
	found, err := buttons(fstest.MapFS{
		"event0/device/name": {Data: []byte("Power Button\n")},
		"event1/device/name": {Data: []byte("AT Translated Set 2 keyboard\n")},
		"event2/other":       {},
		"event7/device/name": {Data: []byte("Power Button\n")},
		"mouse0/device/name": {Data: []byte("Power Button\n")},
	})
	if err != nil || !slices.Equal(found, []string{"event0", "event7"}) {
		t.Errorf("%q, %v", found, err)
	}
}
