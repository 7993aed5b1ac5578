package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"time"

	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
)

// What each drill looks at beyond the signatures.

// unshown fails when the state says nothing of what is broken some looks after the break: what is under way ends first.
func (r *rehearsal) unshown(or string) error {
	if r.notes["unshown"]++; r.notes["unshown"] < 10 {
		return nil
	}
	return errors.New(or)
}

func lookAtDatabase(_ context.Context, r *rehearsal) error {
	p := r.state.Projection
	if p.LastError == "" {
		return r.unshown("中心库已断开，状态却没有显示 (the state does not show that the database is away)")
	}
	if _, seen := r.notes["first"]; !seen {
		r.notes["first"] = float64(p.Lag)
	}
	r.note("lag", float64(p.Lag))
	return nil
}

func afterDatabase(ctx context.Context, r *rehearsal) error {
	if first, most := r.notes["first"], r.notes["lag"]; most <= first {
		return fmt.Errorf("签名照常而落后量没有增长：%.0f 条 (the lag did not grow)", most)
	}
	begun := time.Now() // interval
	if err := r.shipped(ctx); err != nil {
		return err
	}
	r.find("落后量 (lag)", "断开期间显示的由 %.0f 增至 %.0f 条，恢复后 %s 追平 (shown, and caught up)", r.notes["first"], r.notes["lag"], time.Since(begun).Round(time.Millisecond))
	if !r.cfg.Evaluation.Softtoken {
		r.find("与日志逐行对账 (compare)", "生产设备上不在演练中做：由审计管理员 yinjian db compare (the auditor's work in production)")
		return nil
	}
	b, err := r.a.Compare(ctx)
	var p *client.Problem
	if errors.As(err, &p) && p.Code == string(problem.Forbidden) {
		r.find("与日志逐行对账 (compare)", "登录者不是审计管理员，没有做：yinjian db compare (not done: the auditor's work)")
		return nil
	}
	var found struct {
		Rows        uint64
		Differences []json.RawMessage
	}
	if err == nil {
		err = json.Unmarshal(b, &found)
	}
	if err != nil {
		return explain(err)
	}
	if len(found.Differences) > 0 {
		return fmt.Errorf("与日志对账有 %d 处不符 (differences): %s", len(found.Differences), found.Differences[0])
	}
	r.find("与日志逐行对账 (compare)", "%d 行，没有不符 (rows, no differences)", found.Rows)
	return nil
}

// shipped waits until the database has what the journal has now.
func (r *rehearsal) shipped(ctx context.Context) error {
	now, err := r.see(ctx)
	if err != nil {
		return explain(err)
	}
	return r.await(ctx, "恢复后中心库没有追平 (the database did not catch up)", func(s stateView) bool {
		return s.Projection.LastError == "" && s.Projection.Shipped >= now.Journal.Entries
	})
}

// rowsOnce holds the central database's rows against the records that were acknowledged: each once, under the same leaf.
func rowsOnce(r *rehearsal, rows []wire.DrillRow) error {
	seen := map[string]bool{}
	for _, row := range rows {
		leaf, ours := r.leaves[row.RecordID]
		if !ours || seen[row.RecordID] || leaf != row.Leaf {
			return fmt.Errorf("中心库的记录 %s：本次的 %v，重复 %v，叶 %s，日志的 %s (a row that is not the journal's, or comes twice)", row.RecordID, ours, seen[row.RecordID], row.Leaf, leaf)
		}
		seen[row.RecordID] = true
	}
	if len(seen) != len(r.leaves) {
		return fmt.Errorf("应答过 %d 条，中心库有 %d 条 (acknowledged, and in the database)", len(r.leaves), len(seen))
	}
	r.find("中心库中的记录 (rows)", "%d 条，各一行，与日志同一叶 (each once, under the journal's leaf)", len(seen))
	return nil
}

// A timeView is what `yinjian time status` says.
type timeView struct {
	State    string
	BoundUS  int64 `json:"bound_us"`
	DriftPPM int64 `json:"drift_ppm"`
	LeftS    int64 `json:"left_s"`
}

func (r *rehearsal) time(ctx context.Context) (timeView, error) {
	var t timeView
	b, err := r.a.TimeStatus(ctx)
	if err == nil {
		err = json.Unmarshal(b, &t)
	}
	return t, err
}

func trustedState(s string) bool { return s == "trusted" || s == "holdover" }

// lookAtTime has a token made between two looks at the clock: it comes while time is trusted, and does not while it is not.
func lookAtTime(ctx context.Context, r *rehearsal) error {
	before, err := r.time(ctx)
	if err != nil {
		return explain(err)
	}
	at := time.Now() // interval
	_, terr := r.tester.client.Timestamp(ctx, &wire.TimestampRequest{Data: []byte(r.tester.id)})
	after, err := r.time(ctx)
	if err != nil {
		return explain(err)
	}
	signed := r.made[fmt.Sprintf("%s-during-%d", r.tester.id, r.asked()-1)] != ""
	switch {
	case before.State == "untrusted" && after.State == "untrusted":
		if terr == nil {
			return errors.New("时间不可信，却盖了时间戳 (a token was made while time was not trusted)")
		}
		if code := outcomeOf(terr); code != string(problem.TimeUntrusted) && code != string(problem.NotReady) {
			return explain(terr)
		}
		r.notes["stamps refused"]++
		if signed && r.state.Time.State == "untrusted" {
			return errors.New("时间不可信，却签了名 (a signature was made while time was not trusted)")
		}
	case trustedState(before.State) && trustedState(after.State):
		if terr != nil {
			return explain(terr)
		}
		r.notes["stamps"]++
		if signed && r.state.Time.State == "holdover" {
			r.notes["signed in holdover"]++
		}
	}
	if before.State == "holdover" {
		if len(r.bounds) == 0 {
			r.began = at
		}
		r.bounds = append(r.bounds, boundSample{at.Sub(r.began).Seconds(), float64(before.BoundUS), float64(before.DriftPPM)})
	}
	return nil
}

// A boundSample is the clock's bound so long after holdover began.
type boundSample struct{ s, us, ppm float64 }

// grown holds the bound's growth against the oscillator's drift, and answers it, in microseconds, and over how many seconds.
// A reading that was interrupted is wider than it has to be, and a kernel whose clock is being corrected widens all of them: so
// it is the narrowest of either half that are compared, and more growth than the drift's is in order.
func grown(samples []boundSample) (us, s float64, err error) {
	if len(samples) < 2 {
		return 0, 0, errors.New("守时期间看到的次数太少：演练太短或机器太忙，加长 --seconds (holdover was hardly seen: make the drill longer)")
	}
	s = samples[len(samples)-1].s
	ppm := samples[0].ppm
	narrowest := func(of []boundSample) float64 { // beyond what the drift makes of it
		least := math.Inf(1)
		for _, b := range of {
			least = min(least, b.us-ppm*b.s)
		}
		return least
	}
	half := len(samples) / 2
	early, late := narrowest(samples[:half]), narrowest(samples[half:])
	us = late - early + ppm*s
	if us < 0.7*ppm*s || us > (ppm+600)*s+2_000 {
		return us, s, fmt.Errorf("误差上限 %.0f s 内增长 %.0f µs，按 %.0f ppm 至少应约 %.0f µs (the bound grew otherwise than it should)", s, us, ppm, ppm*s)
	}
	return us, s, nil
}

// asked is how many requests were made while it is broken.
func (r *rehearsal) asked() int { return r.report.During["signed"] + len(r.refused) }

func afterTime(ctx context.Context, r *rehearsal) error {
	us, seconds, err := grown(r.bounds)
	if err != nil {
		return err
	}
	for _, name := range []string{"stamps", "stamps refused", "signed in holdover"} {
		if r.notes[name] == 0 {
			return fmt.Errorf("没有看到 %s：演练太短或机器太忙，加长 --seconds (it was not seen: make the drill longer)", name)
		}
	}
	if len(r.refused) == 0 {
		return errors.New("超过期限后签名没有被拒绝 (signatures were not refused beyond the limit)")
	}
	if err := r.await(ctx, "恢复后没有重新同步 (time is not synchronised again)", func(s stateView) bool { return s.Time.State == "trusted" }); err != nil {
		return err
	}
	r.find("守时 (holdover)", "误差上限 %.0f s 内增长 %.0f µs；其间签名 %.0f 条，时间戳 %.0f 个 (the bound's growth; signatures and tokens)", seconds, us, r.notes["signed in holdover"], r.notes["stamps"])
	r.find("超过期限 (beyond)", "拒绝时间戳 %.0f 个、签名 %d 条，一个也没有盖 (refused, none was made)", r.notes["stamps refused"], len(r.refused))
	r.find("恢复后 (afterwards)", "重新同步，误差上限 %.1f ms (synchronised again)", r.state.Time.BoundMS)
	return nil
}

func lookAtCampus(_ context.Context, r *rehearsal) error {
	p := r.state.Peer
	if p == nil || p.Up {
		return r.unshown("线路已断开，状态却没有显示 (the state does not show that the line is cut)")
	}
	r.note("age", p.AgeS)
	r.note("behind", float64(r.state.Journal.Entries)-float64(p.Confirmed))
	return nil
}

func afterCampus(ctx context.Context, r *rehearsal) error {
	if r.notes["age"] < 1 || r.notes["behind"] <= 0 {
		return fmt.Errorf("目录副本没有变旧（%.1f s），或检查点没有落后（%.0f 条） (the copy did not age, or the checkpoints did not lag)", r.notes["age"], r.notes["behind"])
	}
	now, err := r.see(ctx)
	if err != nil {
		return explain(err)
	}
	begun := time.Now() // interval
	if err := r.await(ctx, "恢复后没有追平 (it did not catch up)", func(s stateView) bool {
		return s.Peer != nil && s.Peer.Up && s.Peer.Confirmed >= now.Journal.Entries && s.Peer.AgeS < r.notes["age"]
	}); err != nil {
		return err
	}
	r.find("目录副本 (copy of the directory)", "断开期间旧到 %.0f s，恢复后 %.1f s (aged, and fresh again)", r.notes["age"], r.state.Peer.AgeS)
	r.find("互证的检查点 (cosigned checkpoints)", "落后至多 %.0f 条，恢复后 %s 追平 (behind, and caught up)", r.notes["behind"], time.Since(begun).Round(time.Millisecond))
	return r.shipped(ctx)
}

func lookAtList(_ context.Context, r *rehearsal) error {
	if r.report.During["signed"] > 0 && len(r.refused) > 0 {
		r.notes["ran out"] = 1
	}
	return nil
}

// afterRevocation has the signer's certificate revoked. What it signed before is judged after.
func afterRevocation(ctx context.Context, r *rehearsal) error {
	if r.notes["ran out"] == 0 {
		return errors.New("没有看到列表到期前照常、到期后拒绝 (it was not seen that signing went on until the list ran out, and no longer)")
	}
	if _, err := r.a.BreakDrill(ctx, wire.BreakDrill{ID: r.tester.id, Revoke: true}); err != nil {
		return explain(err)
	}
	key := r.tester.id + "-revoked"
	_, err := r.tester.sign(ctx, key, []byte(key))
	if err == nil {
		return errors.New("证书已吊销，却签了名 (a signature was made although the certificate is revoked)")
	}
	var p *client.Problem
	if !errors.As(err, &p) || p.Code != string(problem.CertificateUnusable) {
		return fmt.Errorf("证书已吊销，签名没有以 %s 拒绝 (the certificate is revoked; the refusal is another): %w", problem.CertificateUnusable, explain(err))
	}
	r.find("列表断供 (the list ran out)", "到期前签成 %d 条，到期后拒绝 %d 条 (signed before, refused after)", r.report.During["signed"], len(r.refused))
	r.find("吊销 (revocation)", "吊销后拒绝：%s；此前的证据仍须有效 (refused; what was signed before is judged after it)", p.Detail)
	return nil
}
