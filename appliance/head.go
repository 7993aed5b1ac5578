package appliance

import (
	"context"
	"crypto/hmac"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"yinjian/appliance/audit"
	"yinjian/hsm"
)

// A head is the journal's end as it was at some moment, kept outside the journal's folder and replaced about every
// second: whoever puts the journal back to an older state has to put this file back too, to a version that was sealed
// then and that nobody keeps. The MAC's key never leaves the cipher machine.
type head struct {
	Node string `json:"node"`
	Size uint64 `json:"size"`
	Root string `json:"root"` // hex
	MAC  string `json:"mac"`  // hex
}

const headEvery = time.Second

func (a *Appliance) headFile() string { return filepath.Join(a.dir, "journal.head") }

// authenticated is what the MAC is over: the fields, each with its length.
func (h head) authenticated() []byte {
	in := []byte("yinjian/journal/headfile/v1\x00")
	for _, s := range []string{h.Node, h.Root} {
		in = binary.BigEndian.AppendUint32(in, uint32(len(s)))
		in = append(in, s...)
	}
	return binary.BigEndian.AppendUint64(in, h.Size)
}

// headMAC is HMAC-SM3 over the head's fields.
func (a *Appliance) headMAC(ctx context.Context, h head) ([]byte, error) {
	return macKeys{a.tokens[hsm.Log]}.MAC(ctx, headLabel, h.authenticated())
}

// saveHead writes the head file for the journal as it is now.
func (a *Appliance) saveHead(ctx context.Context) (uint64, error) {
	h := head{Node: a.cfg.Node, Size: a.journal.Size()}
	root, err := a.journal.Root(ctx, h.Size)
	if err != nil {
		return 0, err
	}
	h.Root = root.String()
	mac, err := a.headMAC(ctx, h)
	if err != nil {
		return 0, err
	}
	h.MAC = hex.EncodeToString(mac)
	b, err := json.Marshal(h)
	if err != nil {
		return 0, err
	}
	return h.Size, writeFile(a.headFile(), b, 0o600)
}

// keepHead replaces the head file while the journal grows, and a last time at the stop.
func (a *Appliance) keepHead(ctx context.Context) error {
	tick := time.NewTicker(headEvery)
	defer tick.Stop()
	var saved uint64
	save := func(ctx context.Context) {
		if a.journal.Size() == saved {
			return
		}
		size, err := a.saveHead(ctx)
		if err != nil {
			a.log.WithError(err).Warning("the journal's head file could not be replaced; it is tried again")
			return
		}
		saved = size
	}
	for {
		select {
		case <-tick.C:
			save(ctx)
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			save(last)
			return nil
		}
	}
}

// errRolledBack is what checkHead's errors are.
var errRolledBack = errors.New("日志与 journal.head 不符：日志可能被换成旧的，或被改写。保留现场；确认是恢复备份的，在设备目录建空文件 restored 后重启，将开启新纪元并记入日志 " +
	"(the journal does not agree with journal.head: it may have been put back to an older state or rewritten; keep everything as it is; if a backup was restored on purpose, make an empty file named restored and start again)")

// checkHead holds the journal against the head file. born says that the journal knows its identity: before that, a
// crash may have come before the first head file.
func (a *Appliance) checkHead(ctx context.Context, born bool) error {
	b, err := os.ReadFile(a.headFile())
	if errors.Is(err, os.ErrNotExist) {
		if !born {
			return nil
		}
		return fmt.Errorf("%w: 缺少该文件 (the file is missing)", errRolledBack)
	}
	var h head
	if err == nil {
		err = json.Unmarshal(b, &h)
	}
	if err != nil {
		return fmt.Errorf("%w: %v", errRolledBack, err)
	}
	want, err := a.headMAC(ctx, h)
	if err != nil {
		return err
	}
	got, err := hex.DecodeString(h.MAC)
	switch {
	case err != nil || !hmac.Equal(got, want) || h.Node != a.cfg.Node:
		return fmt.Errorf("%w: 校验码不对 (its MAC is wrong)", errRolledBack)
	case a.journal.Size() < h.Size:
		return fmt.Errorf("%w: 日志有 %d 条，曾有 %d 条 (the journal has %d entries and had %d)", errRolledBack, a.journal.Size(), h.Size, a.journal.Size(), h.Size)
	}
	root, err := a.journal.Root(ctx, h.Size)
	if err != nil {
		return err
	}
	if root.String() != h.Root {
		return fmt.Errorf("%w: 前 %d 条不是原来的 (the first %d entries are others)", errRolledBack, h.Size, h.Size)
	}
	return nil
}

// errReborn refuses an empty journal where there was one.
var errReborn = errors.New("日志是空的，但本机早已启用：日志被删除或未恢复。请恢复 journal 目录的备份；要从头开始，请用全新的目录和令牌 " +
	"(the journal is empty, but this appliance has lived: restore the journal's folder, or begin anew with another folder and new tokens)")

// checkNotReborn looks for traces of an earlier life before a new journal is begun: public files, the head file, keys
// that are made only after the first entries are on disk. Without it, whoever deletes the journal gets an appliance
// of the same name that has forgotten everything.
func (a *Appliance) checkNotReborn(ctx context.Context) error {
	for _, name := range []string{"journal.head", "log.pem", "central.db"} {
		if _, err := os.Stat(filepath.Join(a.dir, name)); err == nil {
			return fmt.Errorf("%w: 有 %s (is there)", errReborn, name)
		}
	}
	for class, label := range map[hsm.SlotClass]string{hsm.CA: caLabels[string(hsm.SM2)], hsm.TSA: a.cfg.units()[0].label()} {
		_, err := a.tokens[class].FindKey(ctx, label)
		if err == nil {
			return fmt.Errorf("%w: 密码机中有密钥 %s (is in the cipher machine)", errReborn, label)
		}
		if !errors.Is(err, hsm.ErrKeyNotFound) {
			return err
		}
	}
	return nil
}

// hasIdentity says whether the journal knows who it is of.
func (a *Appliance) hasIdentity(ctx context.Context) (bool, error) {
	found := false
	err := a.journal.State(ctx, func(r audit.Record) error {
		found = found || r.Entry.Kind == kindIdentity
		return nil
	})
	return found, err
}
