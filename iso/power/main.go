//go:build linux

// Command yinjian-power waits for the power button of a machine that runs the sealed image and ends when it is pressed: its
// unit has the machine switched off in order then (SuccessAction=). It stands in for logind, which would bring a bus and
// logins with it. A keyboard's power key is not asked: who plugs one in switches nothing off.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"time"
)

// again is how often buttons are looked for until there is one: the driver may come after this program.
const again = 5 * time.Second

func main() {
	pressed := make(chan error)
	watched := map[string]bool{}
	for {
		names, err := buttons(os.DirFS("/sys/class/input"))
		if err != nil {
			fmt.Fprintln(os.Stderr, "yinjian-power:", err)
			os.Exit(1)
		}
		for _, name := range names {
			f, err := os.Open("/dev/input/" + name)
			if err != nil || watched[name] {
				continue // not there yet
			}
			watched[name] = true
			go func() { pressed <- press(f) }()
		}
		select {
		case err := <-pressed:
			if err != nil {
				fmt.Fprintln(os.Stderr, "yinjian-power:", err)
				os.Exit(1)
			}
			fmt.Println("电源键：正常关机 (the power button was pressed: switching off)")
			return
		case <-time.After(again):
		}
	}
}

// buttons are the event devices that the firmware describes as power buttons (ACPI 6.5 §4.8.2.2.1; the kernel names both
// forms so).
func buttons(class fs.FS) ([]string, error) {
	names, err := fs.Glob(class, "event*")
	if err != nil {
		return nil, err
	}
	var found []string
	for _, name := range names {
		text, err := fs.ReadFile(class, path.Join(name, "device/name"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has just gone
		}
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(text)) == "Power Button" {
			found = append(found, name)
		}
	}
	return found, nil
}

// Of linux/input-event-codes.h.
const (
	evKey    = 1
	keyPower = 116
	keyDown  = 1
)

// press reads events (struct input_event: 16 bytes of time, type, code, value) until the button goes down.
func press(r io.Reader) error {
	for {
		var event struct {
			Time       [16]byte
			Type, Code uint16
			Value      int32
		}
		if err := binary.Read(r, binary.NativeEndian, &event); err != nil {
			return err
		}
		if event.Type == evKey && event.Code == keyPower && event.Value == keyDown {
			return nil
		}
	}
}
