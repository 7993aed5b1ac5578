package appliance

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"yinjian/appliance/assess"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/pki"
	"yinjian/dbdriver/sqlite"
)

// Bounds of what is read again where nobody asked for all of it.
const (
	journalRead   = 1_000_000 // entries
	samplesTaken  = 10        // signatures that are judged again
	samplesWithin = 20_000    // entries that are searched for them, the newest
	drillRows     = 400       // entries of the scratch copy
	rowPause      = 2 * time.Millisecond
)

// integrity is section 6.
func (c *collection) integrity() {
	a := c.a
	c.try(assess.SectionIntegrity, line{
		id: "integrity.journal", title: "日志重新核验 (the journal, read again)", command: "yinjian audit verify --dir DIR -o json",
		shows: "每一条的编码、编号、叶散列、链与内部节点一致，树根与日志密钥签署的检查点一致", limits: "检查点之后的条目只由散列链保护；掌握日志密钥者另造一份日志，只有另一院区的见证签名看得出",
	}, func() (any, error) {
		if n := a.journal.Size(); n > journalRead && !c.req.Full {
			return map[string]any{"entries": n}, missing(fmt.Sprintf("日志有 %d 条，带 --full 才全部重读 (with --full all of it is read)", n))
		}
		begun := time.Now() // interval
		r, err := audit.Verify(c.ctx, a.store, audit.Options{
			LogKey: a.logKey.Public(), CheckToken: a.checkToken(), Sealer: headSealer{macKeys{a.tokens["log"]}}, Progress: func(uint64, uint64) { rest(c.ctx, &begun) },
		})
		if err != nil {
			return r, missing(err.Error())
		}
		if n := len(r.Findings); n > 0 {
			return r, fmt.Errorf("%d 处 (findings)，第一处：%s", n, r.Findings[0].DetailZH)
		}
		return r, nil
	})
	c.try(assess.SectionIntegrity, line{
		id: "integrity.directory", title: "目录的变更：应用、签名人、密钥、证书、信任锚、管理员 (changes of the directory)", command: "yinjian change list --dir DIR",
		shows:  "日志里改变状态的每个条目此刻都证明是日志树中的叶，编号无缺，不少于最近检查点所计",
		limits: "证明变更未被改、未被删，不证明决定的人有权决定；config.toml 里的策略不在日志里；最近检查点之后的条目尚无签名",
	}, func() (any, error) {
		kinds := map[string]int{}
		n := 0
		begun := time.Now() // interval
		err := a.journal.State(c.ctx, func(r audit.Record) error {
			if n++; n%256 == 0 {
				rest(c.ctx, &begun)
			}
			kinds[r.Entry.Kind]++
			return c.ctx.Err()
		})
		return map[string]any{"changes": n, "kinds": kinds, "state": a.directoryState()}, err
	})
	c.try(assess.SectionIntegrity, line{
		id: "integrity.rows", title: "中心库的行与集合根的 MAC (MACs of rows and set roots)", command: "yinjian db sweep --dir DIR -o json",
		shows: "本机写入中心库的批次、变更行与集合根的 HMAC-SM3 都对得上", limits: "只核对本机写的行；另一院区的由它核对",
	}, func() (any, error) {
		if s := a.projection.status(); s.Error != "" {
			return nil, missing("中心库不可用 (not available): " + s.Error)
		}
		r, err := a.projection.sweep(c.ctx, c.actor, func(ctx context.Context) error {
			select {
			case <-time.After(rowPause):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		if err != nil {
			return nil, missing(shownProblem(err))
		}
		if !r.OK() {
			return r, fmt.Errorf("%d 处，第一处：%s", len(r.Differences), r.Differences[0].DetailZH)
		}
		if r.MACsChecked == 0 {
			return r, missing("中心库中还没有带 MAC 的行 (there is no row with a MAC yet)")
		}
		return r, nil
	})
	c.try(assess.SectionIntegrity, line{
		id: "integrity.heads", title: "两院区的日志头与见证签名 (heads at both campuses, cosignatures)", command: "yinjian peer status --dir DIR -o json",
		shows: "另一院区见证过本机的检查点，没有分叉", limits: "见证只及被见证的检查点为止",
	}, func() (any, error) {
		raw := map[string]any{"entries": a.journal.Size(), "sealed_to": a.journal.SealedTo()}
		if p, err := a.journal.LastCheckpoint(); err == nil {
			raw["checkpoint"] = map[string]any{"size": p.Size, "root": p.Root.String(), "note": string(p.Note), "signature": p.Signature}
		}
		peer := a.peers.state()
		if peer == nil {
			return raw, missing("没有与另一院区结对，没有见证人 (not paired: nobody cosigns)")
		}
		raw["peer"] = peer
		switch {
		case peer.Split != "" || peer.Accused != "":
			return raw, errors.New("分叉 (split view): " + peer.Split + peer.Accused)
		case peer.Gotten == 0:
			return raw, missing("还没有见证签名 (no cosignature yet)")
		}
		return raw, nil
	})
	c.absent(assess.SectionIntegrity, line{id: "integrity.config", title: "配置的完整性 (configuration)", limits: "配置文件的 SM3 见 software.files"}, "配置已量度，没有带 MAC 的基准可比 (measured, with nothing under a MAC to compare it with)")
	c.absent(assess.SectionIntegrity, line{id: "integrity.sealed_columns", title: "中心库的密封列 (sealed columns)"}, "关闭：中心库的列为明文，按招标“数据不得加密” (off: the columns are plain)")
	samples := c.samples()
	c.drills(samples)
}

// trusts are the anchors that are admitted now.
func (a *Appliance) trusts() evidence.Trust {
	t := a.trust
	t.Signers, t.Units = a.directory.AnchorsFor(pki.StaffSigning), a.directory.AnchorsFor(pki.TimeStamping)
	return t
}

// samples judges the newest signatures again, and answers the evidence of one that is valid.
func (c *collection) samples() (valid *evidence.Bundle) {
	a := c.a
	c.try(assess.SectionIntegrity, line{
		id: "integrity.samples", title: fmt.Sprintf("最近 %d 份签名与时间戳重新核验 (the newest signatures, judged again)", samplesTaken), command: "yinjian-verify EVIDENCE.json",
		shows: "签名、时间戳、证书路径、吊销状态、日志包含证明此刻重新核验通过", limits: "抽样；原文不在设备内，以记录的摘要代替",
	}, func() (any, error) {
		var found []audit.Record
		size := a.journal.Size()
		begun, n := time.Now(), 0 // interval
		err := a.journal.Range(c.ctx, size-min(size, samplesWithin), func(r audit.Record) error {
			if n++; n%256 == 0 {
				rest(c.ctx, &begun)
			}
			if r.Entry.Kind == evidence.KindSign {
				found = append(found, r)
				found = found[max(0, len(found)-samplesTaken):]
			}
			return c.ctx.Err()
		})
		if err != nil {
			return nil, err
		}
		type judged struct {
			Record  string      `json:"record_id"`
			Form    string      `json:"form"`
			Verdict pki.Verdict `json:"verdict"`
			Missing []string    `json:"missing,omitempty"`
			Failed  []string    `json:"failed,omitempty"`
			GenTime string      `json:"gen_time"`
		}
		out := []judged{}
		bad := 0
		for _, rec := range found {
			b, err := evidence.Build(c.ctx, a.journal, rec)
			if err != nil {
				return out, err
			}
			digest, err := hex.DecodeString(b.Record.Digest)
			if err != nil {
				return out, err
			}
			r := evidence.Verify(b, a.trusts(), evidence.Input{Digest: digest, DigestAlgorithm: b.Record.DigestAlgorithm})
			j := judged{Record: b.RecordID, Form: b.Signature.Form, Verdict: r.Verdict, Missing: r.Missing, GenTime: r.GenTime}
			for _, check := range r.Checks {
				if check.Status == pki.Failed {
					j.Failed = append(j.Failed, check.ID)
				}
			}
			switch r.Verdict {
			case pki.Invalid:
				bad++
			case pki.Valid:
				valid = b
			}
			out = append(out, j)
			rest(c.ctx, &begun)
		}
		switch {
		case bad > 0:
			return out, fmt.Errorf("%d 份无效 (invalid)", bad)
		case len(out) == 0:
			return out, missing(fmt.Sprintf("最近 %d 条日志中没有签名 (no signature among the newest entries)", samplesWithin))
		case valid == nil:
			return out, missing("没有一份能不凭原文判为有效：裸签名须有原文 (none can be judged without its document)")
		}
		return out, nil
	})
	return valid
}

// A drilled is what came of a drill: one bit was flipped in a copy, and was it found.
type drilled struct {
	Copy     string   `json:"copy"`
	Flipped  string   `json:"flipped"`
	Before   int      `json:"findings_before"`
	Findings []string `json:"findings"`
}

// drills flips one bit in copies. A flip that is not found makes the item fail.
func (c *collection) drills(valid *evidence.Bundle) {
	const limits = "演练用拷贝，原件不动；只翻一个比特"
	c.try(assess.SectionIntegrity, line{
		id: "integrity.drill.segment", title: "改动演练：日志段的拷贝翻一个比特 (drill: a copy of a segment)", command: "yinjian audit verify --journal COPY", limits: limits,
		shows: "在日志第一段开头的拷贝里翻一个比特，核验指出了那一条",
	}, func() (any, error) { return c.drillSegment(flipEntry) })
	c.try(assess.SectionIntegrity, line{
		id: "integrity.drill.row", title: "改动演练：中心库一行的拷贝翻一个比特 (drill: a copy of a row)", command: "yinjian db sweep --dir DIR", limits: limits,
		shows: "一行的拷贝翻一个比特，其 MAC 不再相符；原行相符",
	}, c.drillRow)
	c.try(assess.SectionIntegrity, line{
		id: "integrity.drill.evidence", title: "改动演练：一份证据的拷贝翻一个比特 (drill: a copy of an evidence file)", command: "yinjian-verify EVIDENCE.json", limits: limits,
		shows: "证据文件每处翻一个比特的拷贝都判为无效；原件有效",
	}, func() (any, error) { return c.drillEvidence(valid) })
}

// drillSegment copies, flips and verifies; flip answers the number of the entry that it has changed.
func (c *collection) drillSegment(flip func(dir string, rows []audit.Row) (uint64, error)) (any, error) {
	var name [8]byte
	rand.Read(name[:]) // never fails (crypto/rand)
	dir := filepath.Join(c.a.dir, "run", "assess-"+hex.EncodeToString(name[:]))
	defer os.RemoveAll(dir)
	rows, err := c.copyJournal(dir)
	if err != nil {
		return nil, missing("没有拷成 (the copy was not made): " + err.Error())
	}
	if len(rows) == 0 {
		return nil, missing("日志还是空的 (the journal is empty)")
	}
	before, err := findings(c.ctx, dir)
	if err != nil {
		return nil, missing(err.Error())
	}
	d := drilled{Copy: fmt.Sprintf("第一段的前 %d 条 (the first entries of segment 1)", len(rows)), Before: len(before), Findings: []string{}}
	if len(before) > 0 {
		return d, errors.New("拷贝在改动之前就不完好 (the copy is not sound before the flip)")
	}
	sequence, err := flip(dir, rows)
	if err != nil {
		return d, missing(err.Error())
	}
	d.Flipped = fmt.Sprintf("第 %d 条正中一个比特 (one bit in the middle of entry %d)", sequence, sequence)
	after, err := findings(c.ctx, dir)
	if err != nil {
		return d, missing(err.Error())
	}
	for _, f := range after {
		d.Findings = append(d.Findings, fmt.Sprintf("%s %d: %s", f.Kind, f.Sequence, f.DetailZH))
	}
	if !slices.ContainsFunc(after, func(f audit.Finding) bool { return f.Sequence <= sequence && sequence <= f.Through }) {
		return d, errors.New("翻过的比特没有被指出 (the flip was not found)")
	}
	return d, nil
}

// copyJournal copies the beginning of the journal, row by row, as it is stored.
func (c *collection) copyJournal(dir string) (rows []audit.Row, err error) {
	from := c.a.store
	end := errors.New("enough")
	if err := from.Rows(c.ctx, 1, 0, func(r audit.Row) error {
		if rows = append(rows, r); len(rows) >= drillRows {
			return end
		}
		return nil
	}); err != nil && !errors.Is(err, end) {
		return nil, err
	}
	b := audit.Batch{Rows: rows}
	seen := map[audit.Hash]bool{}
	for _, r := range rows {
		e, err := audit.ParseEntry(r.DER)
		if err != nil {
			return nil, err
		}
		own, err := audit.ParseOwn(r.Own)
		if err != nil {
			return nil, err
		}
		for _, p := range e.Payloads {
			if seen[p.SM3] || slices.ContainsFunc(own, func(b audit.Blob) bool { return b.Sum == p.SM3 }) {
				continue
			}
			seen[p.SM3] = true
			data, err := from.Blob(c.ctx, 1, p.SM3)
			if err != nil {
				return nil, err
			}
			b.Blobs = append(b.Blobs, audit.Blob{Sum: p.SM3, Data: data})
		}
	}
	if err := from.NodesOver(c.ctx, 0, uint64(len(rows)), func(id audit.NodeID, h audit.Hash) { b.Nodes = append(b.Nodes, audit.Node{ID: id, Hash: h}) }); err != nil {
		return nil, err
	}
	to, err := sqlite.OpenJournal(c.ctx, sqlite.JournalConfig{Dir: dir})
	if err != nil {
		return nil, err
	}
	return rows, errors.Join(to.Append(c.ctx, b), to.Close())
}

// findings verifies a copy without keys: what is stored is held against itself.
func findings(ctx context.Context, dir string) ([]audit.Finding, error) {
	store, err := sqlite.OpenJournal(ctx, sqlite.JournalConfig{Dir: dir, ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer store.Close()
	r, err := audit.Verify(ctx, store, audit.Options{})
	if err != nil {
		return nil, err
	}
	return r.Findings, nil
}

// flipEntry flips one bit in the middle of an entry that lies in one piece in a file below dir, and answers its number.
func flipEntry(dir string, rows []audit.Row) (uint64, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return 0, err
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			return 0, err
		}
		for _, r := range slices.Backward(rows) {
			at := bytes.Index(data, r.DER)
			if at < 0 {
				continue
			}
			data[at+len(r.DER)/2] ^= 1
			return uint64(r.Sequence), os.WriteFile(name, data, 0o600)
		}
	}
	return 0, errors.New("没有一条在文件中连续 (no entry lies in one piece)")
}

func (c *collection) drillRow() (any, error) {
	a := c.a
	store, err := a.projection.database()
	if err != nil {
		return nil, missing(shownProblem(err))
	}
	set := audit.ChangesOf(store)
	var row audit.SetRow
	enough := errors.New("enough")
	err = set.Rows(c.ctx, a.cfg.Node, func(r audit.SetRow) error {
		row = r
		return enough
	})
	if err != nil && !errors.Is(err, enough) {
		return nil, missing("中心库没有应答 (the database does not answer)")
	}
	if row.Key == "" {
		return nil, missing("中心库中还没有变更行 (there is no change in the database yet)")
	}
	mac := a.batchKeys()[row.KeyID]
	if mac == nil {
		return nil, missing("这一行的 MAC 由另一把密钥所算 (the row is under another key)")
	}
	d := drilled{Copy: set.Name + " " + row.Key, Findings: []string{}}
	columns := slices.Clone(row.Columns)
	at := slices.IndexFunc(columns, func(col audit.Column) bool { return col.Value != "" })
	if at < 0 {
		return nil, missing("该行没有值 (the row has no value)")
	}
	value := []byte(columns[at].Value)
	value[len(value)/2] ^= 1
	columns[at].Value = string(value)
	d.Flipped = columns[at].Name
	was, err := audit.RowMAC(c.ctx, mac, set.Name, row.Columns)
	if err != nil {
		return d, missing("密码机没有应答 (the machine does not answer): " + err.Error())
	}
	is, err := audit.RowMAC(c.ctx, mac, set.Name, columns)
	if err != nil {
		return d, missing("密码机没有应答 (the machine does not answer): " + err.Error())
	}
	if was != row.MAC {
		d.Before = 1
		return d, errors.New("原行的 MAC 就不相符 (the row's own MAC does not fit)")
	}
	if is == row.MAC {
		return d, errors.New("翻过的比特没有被指出 (the flip was not found)")
	}
	d.Findings = append(d.Findings, string(audit.RowMACWrong))
	return d, nil
}

// evidenceFlips is in how many places of the file a bit is flipped, each in a copy of its own.
const evidenceFlips = 16

func (c *collection) drillEvidence(b *evidence.Bundle) (any, error) {
	if b == nil {
		return nil, missing("没有可判为有效的证据 (there is no evidence that can be judged)")
	}
	file, err := b.Encode()
	if err != nil {
		return nil, err
	}
	digest, err := hex.DecodeString(b.Record.Digest)
	if err != nil {
		return nil, err
	}
	d := drilled{Copy: "evidence " + b.RecordID, Flipped: fmt.Sprintf("%d 处，每份拷贝一个比特", evidenceFlips), Findings: []string{}}
	in := evidence.Input{Digest: digest, DigestAlgorithm: b.Record.DigestAlgorithm}
	begun := time.Now() // interval
	for i := range evidenceFlips {
		rest(c.ctx, &begun)
		at := len(file) * (2*i + 1) / (2 * evidenceFlips)
		for bytes.IndexByte([]byte(" \r\n\t"), file[at]) >= 0 { // white space says nothing
			at++
		}
		copied := bytes.Clone(file)
		copied[at] ^= 1
		r := new(evidence.Report)
		if other, err := evidence.Parse(copied); err != nil {
			r = evidence.Unreadable(err)
		} else {
			r = evidence.Verify(other, c.a.trusts(), in)
		}
		if r.Verdict != pki.Invalid {
			return d, fmt.Errorf("第 %d 字节翻过的比特没有被指出 (the flip in byte %d was not found)", at, at)
		}
		for _, check := range r.Checks {
			if check.Status == pki.Failed {
				d.Findings = append(d.Findings, fmt.Sprintf("%d: %s", at, check.ID))
				break
			}
		}
	}
	return d, nil
}
