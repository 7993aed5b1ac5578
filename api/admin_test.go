package api_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"yinjian/api"
	"yinjian/api/client"
	"yinjian/api/wire"
	"yinjian/appliance/assess"
	"yinjian/appliance/problem"
)

// admin notes what it is asked.
type admin struct {
	mu     sync.Mutex
	actors []string
	asked  []any
	fail   error
}

func (a *admin) note(actor string, req any) (any, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.actors, a.asked = append(a.actors, actor), append(a.asked, req)
	return m{"ok": true}, a.fail
}

func (a *admin) RegisterApplication(_ context.Context, actor string, req api.RegisterApplication) (*api.RegisteredApplication, error) {
	_, err := a.note(actor, req)
	return &api.RegisteredApplication{Application: m{"id": req.ID}, Key: appKey}, err
}
func (a *admin) StopApplication(_ context.Context, actor string, req api.Decision) (any, error) {
	return a.note(actor, req)
}
func (a *admin) LimitApplication(_ context.Context, actor string, req api.LimitApplication) (any, error) {
	return a.note(actor, req)
}
func (a *admin) SetProduction(_ context.Context, actor string, req api.SetProduction) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ImportSigners(_ context.Context, actor string, req api.ImportSigners) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ImportHistory(_ context.Context, actor string, req api.ImportHistory) (any, error) {
	return a.note(actor, req)
}
func (a *admin) CloseHistory(_ context.Context, actor string, req api.HistoryTotals) (any, error) {
	return a.note(actor, req)
}
func (a *admin) SearchSigners(_ context.Context, actor string, req api.SearchSigners) (any, error) {
	return a.note(actor, req)
}
func (a *admin) SearchKeys(_ context.Context, actor string, req api.SearchKeys) (any, error) {
	return a.note(actor, req)
}
func (a *admin) SearchCertificates(_ context.Context, actor string, req api.SearchCertificates) (any, error) {
	return a.note(actor, req)
}
func (a *admin) SearchRecords(_ context.Context, actor string, req api.SearchRecords) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ExamineRecord(_ context.Context, actor string, req api.ExamineRecord) (any, error) {
	return a.note(actor, req)
}
func (a *admin) HistoryRecord(_ context.Context, actor string, req api.HistoryRecord) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListApplications(_ context.Context, actor string) (any, error) {
	return a.note(actor, "applications")
}
func (a *admin) AddSignerKey(_ context.Context, actor string, req api.AddSignerKey) (any, error) {
	return a.note(actor, req)
}
func (a *admin) EnrolSigner(_ context.Context, actor string, req api.EnrolSigner) (any, error) {
	return a.note(actor, req)
}
func (a *admin) SetSignerPIN(_ context.Context, actor string, req api.SetSignerPIN) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RecoverSigner(_ context.Context, actor string, req api.RecoverSigner) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListKeys(_ context.Context, actor string) (any, error) {
	return a.note(actor, "keys")
}
func (a *admin) DestroyKey(_ context.Context, actor string, req api.DestroyKey) (any, error) {
	return a.note(actor, req)
}
func (a *admin) Ceremony(_ context.Context, actor string, req api.Ceremony) (any, error) {
	return a.note(actor, req)
}
func (a *admin) Rederive(_ context.Context, actor string, req api.Rederive) (any, error) {
	return a.note(actor, req)
}
func (a *admin) StopSigner(_ context.Context, actor string, req api.Decision) (any, error) {
	return a.note(actor, req)
}
func (a *admin) StartSigner(_ context.Context, actor string, req api.Decision) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListSigners(_ context.Context, actor string) (any, error) {
	return a.note(actor, "signers")
}
func (a *admin) RevokeCertificate(_ context.Context, actor string, req api.RevokeCertificate) (any, error) {
	return a.note(actor, req)
}
func (a *admin) IssueCRL(_ context.Context, actor string, req api.IssueCRL) (any, error) {
	return a.note(actor, req)
}
func (a *admin) AddAnchor(_ context.Context, actor string, req api.AddAnchor) (any, error) {
	return a.note(actor, req)
}
func (a *admin) WithdrawAnchor(_ context.Context, actor string, req api.Decision) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListAnchors(_ context.Context, actor string) (any, error) {
	return a.note(actor, "anchors")
}
func (a *admin) AddIntermediates(_ context.Context, actor string, req api.AddIntermediates) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RequestCertificate(_ context.Context, actor string, req api.RequestCertificate) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ImportCertificates(_ context.Context, actor string, req api.ImportCertificates) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListCertificates(_ context.Context, actor string) (any, error) {
	return a.note(actor, "certificates")
}
func (a *admin) ImportCRL(_ context.Context, actor string, req api.ImportCRL) (any, error) {
	return a.note(actor, req)
}
func (a *admin) FetchCRLs(_ context.Context, actor string, req api.FetchCRLs) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListCRLs(_ context.Context, actor string) (any, error) {
	return a.note(actor, "lists")
}
func (a *admin) AuditVerify(_ context.Context, actor string, req api.AuditVerify) (any, error) {
	return a.note(actor, req)
}
func (a *admin) Stamp(_ context.Context, actor string, req api.Stamp) (any, error) {
	return a.note(actor, req)
}

func (a *admin) Compare(_ context.Context, actor string, req api.Compare) (any, error) {
	return a.note(actor, req)
}
func (a *admin) Rebuild(_ context.Context, actor string, req api.Rebuild) (any, error) {
	return a.note(actor, req)
}
func (a *admin) Archive(_ context.Context, actor string, req api.Archive) (any, error) {
	return a.note(actor, req)
}
func (a *admin) YearReport(_ context.Context, actor string, req api.YearReport) (any, error) {
	return a.note(actor, req)
}
func (a *admin) AddMachine(_ context.Context, actor string, req api.AddMachine) (any, error) {
	return a.note(actor, req)
}
func (a *admin) DrainMachine(_ context.Context, actor string, req api.ChangeMachine) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ResumeMachine(_ context.Context, actor string, req api.ChangeMachine) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RemoveMachine(_ context.Context, actor string, req api.ChangeMachine) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListMachines(_ context.Context, actor string) (any, error) {
	return a.note(actor, "machines")
}
func (a *admin) TimeStatus(_ context.Context, actor string) (any, error) {
	return a.note(actor, "time")
}
func (a *admin) TimeHistory(_ context.Context, actor string, req api.TimeHistory) (any, error) {
	return a.note(actor, req)
}
func (a *admin) DirectoryStatus(_ context.Context, actor string) (any, error) {
	return a.note(actor, "directory")
}
func (a *admin) DirectoryVersions(_ context.Context, actor string) (any, error) {
	return a.note(actor, "versions")
}
func (a *admin) SkipVersions(_ context.Context, actor string, req api.SkipVersions) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ThawObject(_ context.Context, actor string, req api.ThawObject) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListTimeSources(_ context.Context, actor string) (any, error) {
	return a.note(actor, "time sources")
}
func (a *admin) AddTimeSource(_ context.Context, actor string, req api.AddTimeSource) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RemoveTimeSource(_ context.Context, actor string, req api.RemoveTimeSource) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ReadmitTime(_ context.Context, actor string, req api.ReadmitTime) (any, error) {
	return a.note(actor, req)
}
func (a *admin) SealUnlock(_ context.Context, actor string, req api.SealUnlock) (any, error) {
	return a.note(actor, req)
}
func (a *admin) UnsealUnlock(_ context.Context, actor string, req api.UnsealUnlock) (any, error) {
	return a.note(actor, req)
}
func (a *admin) StampStatus(_ context.Context, actor string) (any, error) {
	return a.note(actor, "tsa")
}
func (a *admin) StopStamping(_ context.Context, actor string, req api.StampService) (any, error) {
	return a.note(actor, req)
}
func (a *admin) StartStamping(_ context.Context, actor string, req api.StampService) (any, error) {
	return a.note(actor, req)
}
func (a *admin) StampLog(_ context.Context, actor string, req api.StampLog) (any, error) {
	return a.note(actor, req)
}
func (a *admin) LogStatus(_ context.Context, actor string) (any, error) { return a.note(actor, "log") }
func (a *admin) SetLog(_ context.Context, actor string, req api.SetLog) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ReadLog(_ context.Context, actor string, req api.ReadLog) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RunPreserve(_ context.Context, actor string, req api.RunPreserve) (any, error) {
	return a.note(actor, req)
}
func (a *admin) PreserveStatus(_ context.Context, actor string) (any, error) {
	return a.note(actor, "preserve")
}
func (a *admin) PreservedRecord(_ context.Context, actor string, req api.PreservedRecord) (any, error) {
	return a.note(actor, req)
}
func (a *admin) SetCustodians(_ context.Context, actor string, req api.SetCustodians) (any, error) {
	return a.note(actor, req)
}
func (a *admin) BeginBackup(_ context.Context, actor string, req api.BeginBackup) (any, error) {
	return a.note(actor, req)
}
func (a *admin) EndBackup(_ context.Context, actor string, req api.EndBackup) (any, error) {
	return a.note(actor, req)
}
func (a *admin) Assess(_ context.Context, actor string, req api.Assess) (any, error) {
	if _, err := a.note(actor, req); err != nil {
		return nil, err
	}
	return wire.Assessed{Pack: []byte("{}")}, nil
}
func (a *admin) FileReport(_ context.Context, actor string, req api.FileReport) (any, error) {
	return a.note(actor, req)
}
func (a *admin) Diagnosis(_ context.Context, actor string) (any, error) {
	return a.note(actor, "diagnosis")
}
func (a *admin) ListAlarms(_ context.Context, actor string) (any, error) {
	return a.note(actor, "alarms")
}
func (a *admin) TestAlarms(_ context.Context, actor string, req api.TestAlarms) (any, error) {
	return a.note(actor, req)
}
func (a *admin) SignReport(_ context.Context, actor string, req api.SignReport) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListReports(_ context.Context, actor string, req api.ListReports) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ReadReport(_ context.Context, actor string, req api.ReadReport) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RunPatrol(_ context.Context, actor string, req api.RunPatrol) (any, error) {
	return a.note(actor, req)
}
func (a *admin) System(_ context.Context, actor string) (any, error) {
	return a.note(actor, "system")
}
func (a *admin) ReadLogFile(_ context.Context, actor string, req api.ReadLogFile) (any, error) {
	return a.note(actor, req)
}
func (a *admin) BeginDrill(_ context.Context, actor string, req api.BeginDrill) (any, error) {
	return a.note(actor, req)
}
func (a *admin) BreakDrill(_ context.Context, actor string, req api.BreakDrill) (any, error) {
	return a.note(actor, req)
}
func (a *admin) EndDrill(_ context.Context, actor string, req api.EndDrill) (any, error) {
	return a.note(actor, req)
}
func (a *admin) DrillStatus(_ context.Context, actor string) (any, error) {
	return a.note(actor, "drill")
}
func (a *admin) UpdateStatus(_ context.Context, actor string) (any, error) {
	return a.note(actor, "update")
}
func (a *admin) StageUpdate(_ context.Context, actor string, bundle io.Reader) (any, error) {
	b, err := io.ReadAll(bundle)
	if err != nil {
		return nil, err
	}
	return a.note(actor, fmt.Sprintf("bundle of %d bytes", len(b)))
}
func (a *admin) CommitUpdate(_ context.Context, actor string, req api.CommitUpdate) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RestartForUpdate(_ context.Context, actor string, req api.RestartForUpdate) (any, error) {
	return a.note(actor, req)
}
func (a *admin) CancelUpdate(_ context.Context, actor string, req api.CancelUpdate) (any, error) {
	return a.note(actor, req)
}
func (a *admin) Settings(_ context.Context, actor string) (any, error) {
	return a.note(actor, "settings")
}

// CheckSettings refuses an overlay that says "wrong", and notes none that is looked at before a change is proposed.
func (a *admin) CheckSettings(_ context.Context, actor string, req api.Settings) (any, error) {
	if string(req.Overlay) == "wrong" {
		return nil, problem.Invalid("settings", "policy.speed：未知的配置项 (unknown key)")
	}
	if actor == "" {
		return m{}, nil
	}
	return a.note(actor, req)
}
func (a *admin) ChangeSettings(_ context.Context, actor string, req api.ChangeSettings) (any, error) {
	return a.note(actor, req)
}
func (a *admin) CancelSettings(_ context.Context, actor string, req api.DecideSettings) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RestartForSettings(_ context.Context, actor string, req api.DecideSettings) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ConfirmSettings(_ context.Context, actor string, req api.DecideSettings) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListPacks(_ context.Context, actor string) (any, error) {
	return a.note(actor, "packs")
}
func (a *admin) StagePack(_ context.Context, actor string, file io.Reader) (any, error) {
	b, err := io.ReadAll(file)
	if err != nil {
		return nil, err
	}
	return a.note(actor, fmt.Sprintf("pack of %d bytes", len(b)))
}
func (a *admin) InstallPack(_ context.Context, actor string, req api.InstallPack) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RemovePack(_ context.Context, actor string, req api.RemovePack) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RegisterPackKey(_ context.Context, actor string, req api.RegisterPackKey) (any, error) {
	return a.note(actor, req)
}
func (a *admin) CarryBackup(_ context.Context, actor string, req api.CarryBackup, out io.Writer) (api.EndBackup, error) {
	if _, err := a.note(actor, req); err != nil {
		return api.EndBackup{}, err
	}
	_, err := io.WriteString(out, "backup")
	return api.EndBackup{ID: req.ID, Size: 6}, err
}
func (a *admin) ListBackups(_ context.Context, actor string) (any, error) {
	return a.note(actor, "backups")
}
func (a *admin) MissingRecords(_ context.Context, actor string) (any, error) {
	return a.note(actor, "missing")
}
func (a *admin) Sweep(_ context.Context, actor string, req wire.Sweep) (any, error) {
	return a.note(actor, req)
}
func (a *admin) ListChanges(_ context.Context, actor string, req wire.ListChanges) (any, error) {
	return a.note(actor, req)
}
func (a *admin) BindClient(_ context.Context, actor string, req api.BindClient) (any, error) {
	return a.note(actor, req)
}
func (a *admin) PeerStatus(_ context.Context, actor string) (any, error) {
	return a.note(actor, "peer")
}
func (a *admin) PeerCard(_ context.Context, actor string, req api.PeerCard) (any, error) {
	return a.note(actor, req)
}
func (a *admin) AddPeer(_ context.Context, actor string, req api.AddPeer) (any, error) {
	return a.note(actor, req)
}
func (a *admin) RemovePeer(_ context.Context, actor string, req api.RemovePeer) (any, error) {
	return a.note(actor, req)
}
func (a *admin) State(_ context.Context, actor string) (any, error) { return a.note(actor, "state") }

// socket serves the kit's admin handler and answers the path.
func (k *kit) socket() string {
	k.t.Helper()
	dir, err := os.MkdirTemp("", "yj") // a socket's path is short: sun_path has 108 bytes
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "admin.sock")
	ln, err := api.ListenAdmin(path)
	if err != nil {
		k.t.Fatal(err)
	}
	serve(k.t, k.server.NewAdminServer(), ln)
	return path
}

func TestAdminReachesEveryRoute(t *testing.T) {
	t.Parallel()
	k := start(t)
	a := client.NewAdmin(k.socket())
	t.Cleanup(a.Close)
	ctx := t.Context()
	check := func(_ json.RawMessage, err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
		}
	}
	reg := wire.RegisterApplication{ID: "his", Name: "门诊", Campus: "east", Rights: []string{"sign"}, Stamp: "required", Consent: []string{"signer-pin"}, Test: true, Rate: 50, Burst: 80}
	got, err := a.RegisterApplication(ctx, reg)
	if err != nil || !cmp.Equal(got.Key, appKey) {
		t.Errorf("RegisterApplication = %v, %v", got, err)
	}
	enrol := wire.EnrolSigner{ID: "D1001", Name: "张三", Department: "心内科", Campus: "east", Algorithms: []string{"SM2", "RSA-2048"}, PIN: "314159"}
	check(a.ListApplications(ctx))
	check(a.StopApplication(ctx, wire.Decision{ID: "his", Reason: "停用"}))
	check(a.LimitApplication(ctx, wire.LimitApplication{ID: "his", Rate: 10_000, Burst: 100_000, Reason: "扩容"}))
	check(a.SetProduction(ctx, wire.SetProduction{ID: "his", Production: true, Reason: "上线"}))
	check(a.BindClient(ctx, wire.BindClient{ID: "his", By: "key", Certificate: []byte("PEM"), Reason: "专线"}))
	bulk := wire.ImportSigners{Signers: []wire.ImportSigner{{ID: "../etc", Algorithms: []string{"SM2"}, Test: true}}, CA: "external", Trial: true} // a bad one is told of alone
	if _, err := a.ImportSigners(ctx, bulk); err != nil {
		t.Error(err)
	}
	older := wire.HistorySource{System: "oldsign", Name: "旧平台", File: "a.csv", FileSM3: bytes.Repeat([]byte{1}, 32)}
	records := wire.ImportHistory{Source: older, Records: []wire.HistoricalRecord{{ID: "1", Line: 2, Signature: bytes.Repeat([]byte{7}, 200<<10)}}, Trial: true}
	if _, err := a.ImportHistory(ctx, records); err != nil {
		t.Error(err)
	}
	totals := wire.HistoryTotals{Source: older, MappingSM3: bytes.Repeat([]byte{2}, 32), Read: 1, Imported: 1}
	check(a.CloseHistory(ctx, totals))
	check(a.HistoryRecord(ctx, wire.HistoryRecord{System: "oldsign", ID: "1"}))
	check(a.EnrolSigner(ctx, enrol))
	check(a.AddSignerKey(ctx, wire.AddSignerKey{Signer: "D1001", Algorithm: "RSA-2048", CA: "external"}))
	check(a.ListSigners(ctx))
	check(a.SetSignerPIN(ctx, wire.SetSignerPIN{Signer: "D1001", PIN: "271828", OldPIN: "314159"}))
	check(a.RecoverSigner(ctx, wire.RecoverSigner{Signer: "D1001", PIN: "271828", Shares: [][]byte{[]byte("one"), []byte("two")}}))
	check(a.Ceremony(ctx, wire.Ceremony{Minutes: []byte("{}")}))
	check(a.Rederive(ctx))
	check(a.ListKeys(ctx))
	check(a.DestroyKey(ctx, wire.DestroyKey{Label: "staff/D1001/0/SM2", Reason: "换发"}))
	check(a.StopSigner(ctx, wire.Decision{ID: "D1001", Reason: "离职"}))
	check(a.StartSigner(ctx, wire.Decision{ID: "D1001", Reason: "返聘"}))
	check(a.RevokeCertificate(ctx, wire.RevokeCertificate{Serial: "01ab", Reason: "keyCompromise"}))
	check(a.IssueCRL(ctx))
	anchor := wire.AddAnchor{Certificate: []byte("root"), Uses: []string{"staff", "tsa"}, Note: "市 CA"}
	check(a.AddAnchor(ctx, anchor))
	check(a.WithdrawAnchor(ctx, wire.Decision{ID: "0123456789ab", Reason: "到期"}))
	check(a.ListAnchors(ctx))
	check(a.AddIntermediates(ctx, wire.AddIntermediates{File: []byte("chain")}))
	request := wire.RequestCertificate{For: "signer:D1001/SM2", NewKey: true, Replace: true, Subject: "CN=张三", Hosts: []string{"a.test"}}
	if _, err := a.RequestCertificate(ctx, request); err != nil {
		t.Error(err)
	}
	// Files may be larger than other requests.
	list := wire.ImportCRL{File: bytes.Repeat([]byte{7}, 200<<10), Source: "ca.crl"}
	cert := wire.ImportCertificates{File: []byte("cert"), Chain: [][]byte{[]byte("ca")}, Owner: "signer:D1001", AcceptSubject: true}
	check(a.ImportCertificates(ctx, cert))
	check(a.ListCertificates(ctx))
	check(a.ImportCRL(ctx, list))
	check(a.FetchCRLs(ctx))
	check(a.ListCRLs(ctx))
	check(a.AddMachine(ctx, wire.AddMachine{File: []byte("name = 'b'"), Reason: "扩容"}))
	for _, act := range []string{"drain", "resume", "remove"} {
		check(a.ChangeMachine(ctx, act, wire.ChangeMachine{Name: "b", Reason: "检修", Force: true}))
	}
	check(a.ListMachines(ctx))
	added := wire.AddTimeSource{Name: "ntp-2", Group: "lan", Address: "192.0.2.22:123", KeyID: 7, KeyType: "AES256", KeyFile: "secrets/ntp.keys", Reason: "扩容", Force: true}
	check(a.TimeStatus(ctx))
	check(a.TimeHistory(ctx, wire.TimeHistory{From: "2026-11-22T00:00:00Z", To: "2026-11-22T06:00:00Z"}))
	check(a.ListTimeSources(ctx))
	check(a.AddTimeSource(ctx, added))
	check(a.RemoveTimeSource(ctx, wire.RemoveTimeSource{Name: "ntp 2", Reason: "检修"}))
	check(a.ReadmitTime(ctx, wire.ReadmitTime{Reason: "核对", Persons: []string{"甲", "乙"}}))
	check(a.SealUnlock(ctx, wire.SealUnlock{Reason: "机房无人", Persons: []string{"甲", "乙"}}))
	check(a.UnsealUnlock(ctx, wire.UnsealUnlock{Reason: "搬迁"}))
	check(a.StampStatus(ctx))
	check(a.ChangeStamping(ctx, "stop", wire.StampService{Reason: "检修"}))
	check(a.ChangeStamping(ctx, "start", wire.StampService{Unit: "sm2", Reason: "检修"}))
	check(a.StampLog(ctx, wire.StampLog{Lines: 5}))
	folder := "logs"
	check(a.LogStatus(ctx))
	check(a.SetLog(ctx, wire.SetLog{Directory: &folder, Level: "debug", KeepDays: 180, Reason: "换目录"}))
	check(a.ReadLog(ctx, wire.ReadLog{Lines: 5}))
	check(a.RunPreserve(ctx))
	check(a.PreserveStatus(ctx))
	check(a.PreservedRecord(ctx, wire.PreservedRecord{ID: strings.Repeat("0a", 32)}))
	two := []string{"甲", "乙"}
	check(a.SetCustodians(ctx, wire.SetCustodians{Record: []byte("{}"), Persons: two}))
	if _, err := a.BeginBackup(ctx, wire.BeginBackup{Persons: two, Target: "/mnt", Incremental: true, Softtoken: true}); err != nil {
		t.Error(err)
	}
	check(a.EndBackup(ctx, wire.EndBackup{ID: "0123456789abcdef", SM3: strings.Repeat("0a", 32), Size: 7, Entries: 5, Through: 1}))
	check(a.EndBackup(ctx, wire.EndBackup{ID: "0123456789abcdef", Failed: "disk full"}))
	check(a.FileReport(ctx, wire.FileReport{Kind: "drill", Backup: "0123456789abcdef", Passed: true, Persons: two, Report: []byte("{}")}))
	check(a.ListBackups(ctx))
	check(a.ListAlarms(ctx))
	if _, err := a.TestAlarms(ctx); err != nil {
		t.Error(err)
	}
	signed := wire.SignReport{Kind: "patrol", Name: "daily", Outcome: "normal", Files: []wire.ReportFile{{Name: "a.json", SM3: strings.Repeat("0a", 32), Size: 1}}, Persons: two, Summary: []byte("{}")}
	check(a.SignReport(ctx, signed))
	check(a.ListReports(ctx, wire.ListReports{Kind: "drill", Most: 7}))
	check(a.ReadReport(ctx, wire.ReadReport{Sequence: 9, File: "a.json"}))
	check(a.RunPatrol(ctx, wire.RunPatrol{Period: "weekly"}))
	check(a.System(ctx))
	check(a.ReadLogFile(ctx, wire.ReadLogFile{Name: "yinjian.log", From: 3}))
	check(a.Diagnosis(ctx))
	drill := wire.BeginDrill{Part: "hsm", Seconds: 30, Machine: "b", Reason: "季度演练", Persons: two}
	if _, err := a.BeginDrill(ctx, drill); err != nil {
		t.Error(err)
	}
	check(a.BreakDrill(ctx, wire.BreakDrill{ID: "drill-0a", Revoke: true}))
	if _, err := a.EndDrill(ctx, wire.EndDrill{ID: "drill-0a"}); err != nil {
		t.Error(err)
	}
	if _, err := a.DrillStatus(ctx); err != nil {
		t.Error(err)
	}
	check(a.UpdateStatus(ctx))
	check(a.StageUpdate(ctx, bytes.NewReader(make([]byte, 5<<20)), 5<<20))
	commit := wire.CommitUpdate{SM3: strings.Repeat("0a", 32), Reason: "补丁", Persons: two}
	check(a.CommitUpdate(ctx, commit))
	check(a.CancelUpdate(ctx, wire.CancelUpdate{Reason: "改期"}))
	check(a.RestartForUpdate(ctx, wire.RestartForUpdate{Reason: "启用"}))
	check(a.Settings(ctx))
	site := wire.Settings{Overlay: []byte("[policy]\nrate = 2000\n"), Remove: []string{"tsa.upstream"}, Secrets: []wire.SecretFile{{Name: "db.password", Secret: []byte("geheim")}}}
	check(a.CheckSettings(ctx, site))
	change := wire.ChangeSettings{Settings: site, Base: strings.Repeat("0c", 32), Changes: []wire.SettingChange{{Key: "policy.rate", Old: "3000", New: "2000"}}, Reason: "限速", Persons: two}
	check(a.ChangeSettings(ctx, change))
	check(a.CancelSettings(ctx, wire.DecideSettings{Reason: "改期"}))
	check(a.RestartForSettings(ctx, wire.DecideSettings{Reason: "启用"}))
	check(a.ConfirmSettings(ctx, wire.DecideSettings{Reason: "连得到"}))
	check(a.ListPacks(ctx))
	check(a.StagePack(ctx, strings.NewReader("pack"), 4))
	install := wire.InstallPack{SM3: strings.Repeat("0b", 32), Reason: "接入密码机", Persons: two}
	check(a.InstallPack(ctx, install))
	check(a.RemovePack(ctx, wire.RemovePack{Name: "vendor-5", Reason: "停用", Persons: two}))
	check(a.RegisterPackKey(ctx, wire.RegisterPackKey{Key: []byte("pem"), Reason: "启用会签", Persons: two}))
	check(a.MissingRecords(ctx))
	check(a.Sweep(ctx))
	changes := wire.ListChanges{Object: "D1001", Actor: "root", Kind: "account.", Since: "2026-11-01T00:00:00+08:00", Until: "2026-11-22T00:00:00Z", Limit: 10_000}
	check(a.ListChanges(ctx, changes))
	check(a.DirectoryStatus(ctx))
	check(a.DirectoryVersions(ctx))
	check(a.SkipVersions(ctx, wire.SkipVersions{Kind: "signer", ID: "D001", Reason: "查无此变更"}))
	check(a.ThawObject(ctx, wire.ThawObject{Kind: "signer", ID: "D001", Reason: "以本部为准"}))
	check(a.PeerStatus(ctx))
	if _, err := a.PeerCard(ctx); err != nil {
		t.Error(err)
	}
	pairing := wire.AddPeer{Card: bytes.Repeat([]byte{7}, 200<<10), Fingerprint: "0123 4567", Persons: two, Reason: "结对"} // it names thousands of signers
	check(a.AddPeer(ctx, pairing))
	check(a.RemovePeer(ctx, wire.RemovePeer{Persons: two, Reason: "换设备"}))
	check(a.AuditVerify(ctx))
	check(a.Compare(ctx))
	check(a.Rebuild(ctx, wire.Rebuild{Replace: []string{"main"}, Journals: []string{"/copy"}, Reason: "坏盘"}))
	check(a.Archive(ctx, wire.Archive{Before: "2025-01", DryRun: true}))
	check(a.YearReport(ctx, wire.YearReport{Year: 2026}))
	check(a.Stamp(ctx, wire.Stamp{Request: []byte("req")}))
	running := false
	people := wire.SearchSigners{Text: "心内", Stopped: &running, Skip: 6250, Most: 50}
	rows := wire.SearchRecords{
		RecordID: strings.Repeat("0a", 32), Kind: "sign.v1", Application: "his", Signer: "D1001", Department: "心内科", Since: "2026-11-01T00:00:00+08:00",
		After: &wire.RecordPlace{AtUS: 7, Node: "east", Epoch: "0123456789abcdef", Sequence: 9}, Most: 500,
	}
	examined := wire.ExamineRecord{ID: strings.Repeat("0a", 32), Document: bytes.Repeat([]byte{7}, 200<<10)}
	check(a.SearchSigners(ctx, people))
	keys := wire.SearchKeys{Text: "staff/", Scope: "own", After: "log", Most: 10}
	check(a.SearchKeys(ctx, keys))
	certificates := wire.SearchCertificates{Scope: "signers", WithinDays: 60, After: "signer:D1"}
	check(a.SearchCertificates(ctx, certificates))
	if _, err := a.SearchRecords(ctx, rows); err != nil {
		t.Error(err)
	}
	check(a.ExamineRecord(ctx, examined))
	assessment := wire.Assess{Nonce: "nonce-0001", Assessor: "测评机构", Full: true, Products: []assess.Product{{
		Covers: []string{"cipher-machine"}, Name: "服务器密码机", Certificate: "GM001", Holder: "某厂", Level: 2, ValidUntil: "2029-01-31",
	}}}
	if got, err := a.Assess(ctx, assessment); err != nil || string(got.Pack) != "{}" {
		t.Errorf("Assess = %v, %v", got, err)
	}
	check(a.State(ctx))
	want := []any{
		reg, "applications", wire.Decision{ID: "his", Reason: "停用"}, wire.LimitApplication{ID: "his", Rate: 10_000, Burst: 100_000, Reason: "扩容"},
		wire.SetProduction{ID: "his", Production: true, Reason: "上线"}, wire.BindClient{ID: "his", By: "key", Certificate: []byte("PEM"), Reason: "专线"}, bulk, records, totals, wire.HistoryRecord{System: "oldsign", ID: "1"}, enrol,
		wire.AddSignerKey{Signer: "D1001", Algorithm: "RSA-2048", CA: "external"}, "signers", wire.SetSignerPIN{Signer: "D1001", PIN: "271828", OldPIN: "314159"},
		wire.RecoverSigner{Signer: "D1001", PIN: "271828", Shares: [][]byte{[]byte("one"), []byte("two")}}, wire.Ceremony{Minutes: []byte("{}")}, wire.Rederive{}, "keys", wire.DestroyKey{Label: "staff/D1001/0/SM2", Reason: "换发"}, wire.Decision{ID: "D1001", Reason: "离职"}, wire.Decision{ID: "D1001", Reason: "返聘"},
		wire.RevokeCertificate{Serial: "01ab", Reason: "keyCompromise"}, wire.IssueCRL{}, anchor, wire.Decision{ID: "0123456789ab", Reason: "到期"}, "anchors", wire.AddIntermediates{File: []byte("chain")}, request,
		cert, "certificates", list, wire.FetchCRLs{}, "lists", wire.AddMachine{File: []byte("name = 'b'"), Reason: "扩容"},
		wire.ChangeMachine{Name: "b", Reason: "检修", Force: true}, wire.ChangeMachine{Name: "b", Reason: "检修", Force: true}, wire.ChangeMachine{Name: "b", Reason: "检修", Force: true}, "machines",
		"time", wire.TimeHistory{From: "2026-11-22T00:00:00Z", To: "2026-11-22T06:00:00Z"}, "time sources", added, wire.RemoveTimeSource{Name: "ntp 2", Reason: "检修"},
		wire.ReadmitTime{Reason: "核对", Persons: []string{"甲", "乙"}}, wire.SealUnlock{Reason: "机房无人", Persons: []string{"甲", "乙"}}, wire.UnsealUnlock{Reason: "搬迁"}, "tsa", wire.StampService{Reason: "检修"}, wire.StampService{Unit: "sm2", Reason: "检修"}, wire.StampLog{Lines: 5},
		"log", wire.SetLog{Directory: &folder, Level: "debug", KeepDays: 180, Reason: "换目录"}, wire.ReadLog{Lines: 5},
		wire.RunPreserve{}, "preserve", wire.PreservedRecord{ID: strings.Repeat("0a", 32)},
		wire.SetCustodians{Record: []byte("{}"), Persons: two}, wire.BeginBackup{Persons: two, Target: "/mnt", Incremental: true, Softtoken: true},
		wire.EndBackup{ID: "0123456789abcdef", SM3: strings.Repeat("0a", 32), Size: 7, Entries: 5, Through: 1}, wire.EndBackup{ID: "0123456789abcdef", Failed: "disk full"},
		wire.FileReport{Kind: "drill", Backup: "0123456789abcdef", Passed: true, Persons: two, Report: []byte("{}")}, "backups", "alarms", wire.TestAlarms{}, signed,
		wire.ListReports{Kind: "drill", Most: 7}, wire.ReadReport{Sequence: 9, File: "a.json"}, wire.RunPatrol{Period: "weekly"}, "system", wire.ReadLogFile{Name: "yinjian.log", From: 3},
		"diagnosis", drill, wire.BreakDrill{ID: "drill-0a", Revoke: true}, wire.EndDrill{ID: "drill-0a"}, "drill",
		"update", "bundle of 5242880 bytes", commit, wire.CancelUpdate{Reason: "改期"}, wire.RestartForUpdate{Reason: "启用"}, "settings", site, change,
		wire.DecideSettings{Reason: "改期"}, wire.DecideSettings{Reason: "启用"}, wire.DecideSettings{Reason: "连得到"}, "packs", "pack of 4 bytes", install,
		wire.RemovePack{Name: "vendor-5", Reason: "停用", Persons: two}, wire.RegisterPackKey{Key: []byte("pem"), Reason: "启用会签", Persons: two}, "missing",
		wire.Sweep{}, changes,
		"directory", "versions", wire.SkipVersions{Kind: "signer", ID: "D001", Reason: "查无此变更"}, wire.ThawObject{Kind: "signer", ID: "D001", Reason: "以本部为准"},
		"peer", wire.PeerCard{}, pairing, wire.RemovePeer{Persons: two, Reason: "换设备"},
		wire.AuditVerify{}, wire.Compare{}, wire.Rebuild{Replace: []string{"main"}, Journals: []string{"/copy"}, Reason: "坏盘"}, wire.Archive{Before: "2025-01", DryRun: true}, wire.YearReport{Year: 2026}, wire.Stamp{Request: []byte("req")},
		people, keys, certificates, rows, examined, assessment, "state",
	}
	if diff := cmp.Diff(want, k.admin.asked); diff != "" {
		t.Error(diff)
	}
	for _, actor := range k.admin.actors {
		if uid := strconv.Itoa(os.Getuid()); !strings.HasPrefix(actor, "local uid="+uid) {
			t.Errorf("actor = %q, want uid %s", actor, uid)
		}
	}

	k.admin.fail = problem.New(problem.Exists, "已存在 (exists)", "换一个编号 (take another id)")
	if _, err := a.EnrolSigner(ctx, enrol); !client.Is(err, problem.Exists) {
		t.Errorf("EnrolSigner = %v, want exists", err)
	}
}

func TestAdminRefusesFaultyFields(t *testing.T) {
	t.Parallel()
	k := start(t)
	a := client.NewAdmin(k.socket())
	t.Cleanup(a.Close)
	ctx := t.Context()
	app := wire.RegisterApplication{ID: "his", Name: "门诊", Campus: "east", Rights: []string{"sign"}, Stamp: "required", Consent: []string{"signer-pin"}}
	signer := wire.EnrolSigner{ID: "D1001", Name: "张三", Department: "心内科", Campus: "east", Algorithms: []string{"SM2"}}
	register := func(change func(*wire.RegisterApplication)) func() error {
		return func() error { r := app; change(&r); _, err := a.RegisterApplication(ctx, r); return err }
	}
	enrol := func(change func(*wire.EnrolSigner)) func() error {
		return func() error { r := signer; change(&r); _, err := a.EnrolSigner(ctx, r); return err }
	}
	for name, row := range map[string]struct {
		do    func() error
		field string
	}{
		"id missing":        {register(func(r *wire.RegisterApplication) { r.ID = "" }), "id"},
		"id upper case":     {register(func(r *wire.RegisterApplication) { r.ID = "HIS" }), "id"},
		"name missing":      {register(func(r *wire.RegisterApplication) { r.Name = "" }), "name"},
		"name too long":     {register(func(r *wire.RegisterApplication) { r.Name = strings.Repeat("门", 43) }), "name"},
		"name with newline": {register(func(r *wire.RegisterApplication) { r.Name = "a\nb" }), "name"},
		"name reversed":     {register(func(r *wire.RegisterApplication) { r.Name = "a\u202eb" }), "name"},
		"campus missing":    {register(func(r *wire.RegisterApplication) { r.Campus = "" }), "campus"},
		"no rights":         {register(func(r *wire.RegisterApplication) { r.Rights = nil }), "rights"},
		"unknown right":     {register(func(r *wire.RegisterApplication) { r.Rights = []string{"root"} }), "rights"},
		"right twice":       {register(func(r *wire.RegisterApplication) { r.Rights = []string{"sign", "sign"} }), "rights"},
		"unknown stamp":     {register(func(r *wire.RegisterApplication) { r.Stamp = "maybe" }), "stamp"},
		"no consent":        {register(func(r *wire.RegisterApplication) { r.Consent = []string{} }), "consent"},
		"unknown consent":   {register(func(r *wire.RegisterApplication) { r.Consent = []string{"sms"} }), "consent"},
		"rate":              {register(func(r *wire.RegisterApplication) { r.Rate = 10_001 }), "rate"},
		"what is no digest": {func() error {
			_, err := a.CommitUpdate(ctx, wire.CommitUpdate{SM3: "0A", Reason: "x", Persons: []string{"甲", "乙"}})
			return err
		}, "sm3"},
		"an update of one person": {func() error {
			_, err := a.CommitUpdate(ctx, wire.CommitUpdate{SM3: strings.Repeat("0a", 32), Reason: "x"})
			return err
		}, "persons"},
		"settings that are wrong, before anybody is asked": {func() error {
			_, err := a.ChangeSettings(ctx, wire.ChangeSettings{Settings: wire.Settings{Overlay: []byte("wrong")}, Base: strings.Repeat("0c", 32), Changes: []wire.SettingChange{}, Reason: "x", Persons: []string{"甲", "乙"}})
			return err
		}, "settings"},
		"settings of one person": {func() error {
			_, err := a.ChangeSettings(ctx, wire.ChangeSettings{Settings: wire.Settings{Overlay: []byte("x")}, Base: strings.Repeat("0c", 32), Changes: []wire.SettingChange{}, Reason: "x"})
			return err
		}, "persons"},
		"a secret without a name": {func() error {
			_, err := a.CheckSettings(ctx, wire.Settings{Overlay: []byte{}, Secrets: []wire.SecretFile{{Secret: []byte("x")}}})
			return err
		}, "secrets[0].name"},
		"too large an overlay": {func() error {
			_, err := a.CheckSettings(ctx, wire.Settings{Overlay: make([]byte, 64<<10+1)})
			return err
		}, "overlay"},
		"a pack's path": {func() error {
			_, err := a.RemovePack(ctx, wire.RemovePack{Name: "../x", Reason: "x", Persons: []string{"甲", "乙"}})
			return err
		}, "name"},
		"a pack of one person": {func() error {
			_, err := a.InstallPack(ctx, wire.InstallPack{SM3: strings.Repeat("0a", 32), Reason: "x"})
			return err
		}, "persons"},
		"no key": {func() error {
			_, err := a.RegisterPackKey(ctx, wire.RegisterPackKey{Reason: "x", Persons: []string{"甲", "乙"}})
			return err
		}, "key"},
		"drill's part":           {func() error { _, err := a.BeginDrill(ctx, wire.BeginDrill{Part: "all"}); return err }, "part"},
		"drill too long":         {func() error { _, err := a.BeginDrill(ctx, wire.BeginDrill{Part: "db", Seconds: 301}); return err }, "seconds"},
		"drill without a reason": {func() error { _, err := a.BeginDrill(ctx, wire.BeginDrill{Part: "db", Seconds: 30}); return err }, "reason"},
		"drill of one person": {func() error {
			_, err := a.BeginDrill(ctx, wire.BeginDrill{Part: "db", Seconds: 30, Reason: "x", Persons: []string{"甲", "甲"}})
			return err
		}, "persons"},
		"report's kind": {func() error {
			_, err := a.SignReport(ctx, wire.SignReport{Kind: "patrols", Files: []wire.ReportFile{}})
			return err
		}, "kind"},
		"report's file": {func() error {
			_, err := a.SignReport(ctx, wire.SignReport{Kind: "patrol", Name: "daily", Outcome: "normal", Files: []wire.ReportFile{{Name: "../a", SM3: strings.Repeat("0a", 32)}}})
			return err
		}, "files[0].name"},
		"reports of no kind":       {func() error { _, err := a.ListReports(ctx, wire.ListReports{Kind: "x"}); return err }, "kind"},
		"a report before them all": {func() error { _, err := a.ReadReport(ctx, wire.ReadReport{Sequence: -1}); return err }, "sequence"},
		"a patrol of no period":    {func() error { _, err := a.RunPatrol(ctx, wire.RunPatrol{Period: "hourly"}); return err }, "period"},
		"a log of no name":         {func() error { _, err := a.ReadLogFile(ctx, wire.ReadLogFile{}); return err }, "name"},
		"report without files": {func() error {
			_, err := a.SignReport(ctx, wire.SignReport{Kind: "patrol", Name: "daily", Outcome: "normal", Files: []wire.ReportFile{}})
			return err
		}, "files"},
		"burst": {register(func(r *wire.RegisterApplication) { r.Burst = -1 }), "burst"},
		"limit's rate": {func() error {
			_, err := a.LimitApplication(ctx, wire.LimitApplication{ID: "his", Rate: -1, Reason: "x"})
			return err
		}, "rate"},
		"limit's burst": {func() error {
			_, err := a.LimitApplication(ctx, wire.LimitApplication{ID: "his", Burst: 100_001, Reason: "x"})
			return err
		}, "burst"},
		"machine without file": {func() error { _, err := a.AddMachine(ctx, wire.AddMachine{Reason: "x"}); return err }, "file"},
		"machine's name": {func() error {
			_, err := a.ChangeMachine(ctx, "drain", wire.ChangeMachine{Name: "B-1", Reason: "x"})
			return err
		}, "path.name"},
		"drain without reason": {func() error {
			_, err := a.ChangeMachine(ctx, "drain", wire.ChangeMachine{Name: "b"})
			return err
		}, "reason"},
		"time source's name": {func() error {
			_, err := a.AddTimeSource(ctx, wire.AddTimeSource{Name: "a b", Group: "g", Address: "h:1", Reason: "x"})
			return err
		}, "name"},
		"time source without group": {func() error {
			_, err := a.AddTimeSource(ctx, wire.AddTimeSource{Name: "a", Address: "h:1", Reason: "x"})
			return err
		}, "group"},
		"time source's key": {func() error {
			_, err := a.AddTimeSource(ctx, wire.AddTimeSource{Name: "a", Group: "g", Address: "h:1", KeyID: 1, KeyType: "MD5", KeyFile: "f", Reason: "x"})
			return err
		}, "key_type"},
		"time source's key id": {func() error {
			_, err := a.AddTimeSource(ctx, wire.AddTimeSource{Name: "a", Group: "g", Address: "h:1", KeyType: "SHA256", KeyFile: "f", Reason: "x"})
			return err
		}, "key_id"},
		"one person readmits": {func() error {
			_, err := a.ReadmitTime(ctx, wire.ReadmitTime{Reason: "x", Persons: []string{"甲"}})
			return err
		}, "persons"},
		"one person seals": {func() error {
			_, err := a.SealUnlock(ctx, wire.SealUnlock{Reason: "x", Persons: []string{"甲", "甲"}})
			return err
		}, "persons"},
		"people unlock without reason":    {func() error { _, err := a.UnsealUnlock(ctx, wire.UnsealUnlock{}); return err }, "reason"},
		"stamping stopped without reason": {func() error { _, err := a.ChangeStamping(ctx, "stop", wire.StampService{}); return err }, "reason"},
		"record id":                       {func() error { _, err := a.PreservedRecord(ctx, wire.PreservedRecord{ID: "0A"}); return err }, "id"},
		"changes since a day":             {func() error { _, err := a.ListChanges(ctx, wire.ListChanges{Since: "2026-11-01"}); return err }, "since"},
		"changes of a long object": {func() error {
			_, err := a.ListChanges(ctx, wire.ListChanges{Object: strings.Repeat("x", 257)})
			return err
		}, "object"},
		"too many changes":      {func() error { _, err := a.ListChanges(ctx, wire.ListChanges{Limit: 10_001}); return err }, "limit"},
		"page too long":         {func() error { _, err := a.SearchSigners(ctx, wire.SearchSigners{Most: 501}); return err }, "most"},
		"page before the first": {func() error { _, err := a.SearchSigners(ctx, wire.SearchSigners{Skip: -1}); return err }, "skip"},
		"scope of keys":         {func() error { _, err := a.SearchKeys(ctx, wire.SearchKeys{Scope: "mine"}); return err }, "scope"},
		"days":                  {func() error { _, err := a.SearchCertificates(ctx, wire.SearchCertificates{WithinDays: -1}); return err }, "within_days"},
		"record id to look for": {func() error { _, err := a.SearchRecords(ctx, wire.SearchRecords{RecordID: "xyz"}); return err }, "record_id"},
		"since when":            {func() error { _, err := a.SearchRecords(ctx, wire.SearchRecords{Since: "gestern"}); return err }, "since"},
		"after nothing": {func() error {
			_, err := a.SearchRecords(ctx, wire.SearchRecords{After: &wire.RecordPlace{Epoch: "0123456789abcdef"}})
			return err
		}, "after.node"},
		"record to examine":         {func() error { _, err := a.ExamineRecord(ctx, wire.ExamineRecord{ID: "0a"}); return err }, "path.id"},
		"nothing to stamp":          {func() error { _, err := a.Stamp(ctx, wire.Stamp{}); return err }, "request"},
		"too many lines":            {func() error { _, err := a.StampLog(ctx, wire.StampLog{Lines: 1001}); return err }, "lines"},
		"too many lines of the log": {func() error { _, err := a.ReadLog(ctx, wire.ReadLog{Lines: 10_001}); return err }, "lines"},
		"a level of no name":        {func() error { _, err := a.SetLog(ctx, wire.SetLog{Level: "loud", Reason: "x"}); return err }, "level"},
		"kept too short":            {func() error { _, err := a.SetLog(ctx, wire.SetLog{KeepDays: 179, Reason: "x"}); return err }, "keep_days"},
		"no reason for the log":     {func() error { _, err := a.SetLog(ctx, wire.SetLog{KeepDays: 180}); return err }, "reason"},
		"production without reason": {func() error { _, err := a.SetProduction(ctx, wire.SetProduction{ID: "his"}); return err }, "reason"},
		"nobody to import":          {func() error { _, err := a.ImportSigners(ctx, wire.ImportSigners{}); return err }, "signers"},
		"too many to import": {func() error {
			_, err := a.ImportSigners(ctx, wire.ImportSigners{Signers: slices.Repeat([]wire.ImportSigner{{Algorithms: []string{"SM2"}}}, 10_001)})
			return err
		}, "signers"},
		"limit without reason":   {func() error { _, err := a.LimitApplication(ctx, wire.LimitApplication{ID: "his", Rate: 1}); return err }, "reason"},
		"rebuild without reason": {func() error { _, err := a.Rebuild(ctx, wire.Rebuild{}); return err }, "reason"},
		"rebuild of no name": {func() error {
			_, err := a.Rebuild(ctx, wire.Rebuild{Remove: []string{""}, Reason: "x"})
			return err
		}, "remove"},
		"archive without reason": {func() error { _, err := a.Archive(ctx, wire.Archive{Before: "2025-01"}); return err }, "reason"},
		"archive of no month":    {func() error { _, err := a.Archive(ctx, wire.Archive{Before: "2025-13", DryRun: true}); return err }, "before"},
		"year of two digits":     {func() error { _, err := a.YearReport(ctx, wire.YearReport{Year: 26}); return err }, "year"},
		"no history": {func() error {
			_, err := a.ImportHistory(ctx, wire.ImportHistory{Source: wire.HistorySource{FileSM3: make([]byte, 32)}, Records: []wire.HistoricalRecord{}})
			return err
		}, "records"},
		"history of no file": {func() error {
			_, err := a.ImportHistory(ctx, wire.ImportHistory{Records: []wire.HistoricalRecord{{ID: "1"}}, Source: wire.HistorySource{FileSM3: []byte{1}}})
			return err
		}, "source.file_sm3"},
		"totals of no mapping": {func() error {
			_, err := a.CloseHistory(ctx, wire.HistoryTotals{Source: wire.HistorySource{FileSM3: make([]byte, 32)}, MappingSM3: []byte{1}})
			return err
		}, "mapping_sm3"},
		"record of no system": {func() error { _, err := a.HistoryRecord(ctx, wire.HistoryRecord{System: "A/b", ID: "1"}); return err }, "system"},
		"limit of nobody": {func() error {
			_, err := a.LimitApplication(ctx, wire.LimitApplication{ID: "x", Rate: 1, Reason: "x"})
			return err
		}, "path.id"},
		"signer id":           {enrol(func(r *wire.EnrolSigner) { r.ID = "D 1" }), "id"},
		"signer name":         {enrol(func(r *wire.EnrolSigner) { r.Name = " x" }), "name"},
		"signer department":   {enrol(func(r *wire.EnrolSigner) { r.Department = "" }), "department"},
		"signer campus":       {enrol(func(r *wire.EnrolSigner) { r.Campus = strings.Repeat("x", 65) }), "campus"},
		"signer no algorithm": {enrol(func(r *wire.EnrolSigner) { r.Algorithms = nil }), "algorithms"},
		"signer algorithm":    {enrol(func(r *wire.EnrolSigner) { r.Algorithms = []string{"DSA"} }), "algorithms"},
		"signer long PIN":     {enrol(func(r *wire.EnrolSigner) { r.PIN = strings.Repeat("1", 65) }), "pin"},
		"key's algorithm": {func() error {
			_, err := a.AddSignerKey(ctx, wire.AddSignerKey{Signer: "D1001", Algorithm: "DSA"})
			return err
		}, "algorithm"},
		"key's CA": {func() error {
			_, err := a.AddSignerKey(ctx, wire.AddSignerKey{Signer: "D1001", Algorithm: "SM2", CA: "mine"})
			return err
		}, "ca"},
		"old PIN": {func() error {
			_, err := a.SetSignerPIN(ctx, wire.SetSignerPIN{Signer: "D1001", PIN: "271828", OldPIN: strings.Repeat("1", 65)})
			return err
		}, "old_pin"},
		"no shares": {func() error {
			_, err := a.RecoverSigner(ctx, wire.RecoverSigner{Signer: "D1001", PIN: "271828"})
			return err
		}, "shares"},
		"an empty share": {func() error {
			_, err := a.RecoverSigner(ctx, wire.RecoverSigner{Signer: "D1001", PIN: "271828", Shares: [][]byte{[]byte("one"), {}}})
			return err
		}, "shares[1]"},
		"a key without label": {func() error { _, err := a.DestroyKey(ctx, wire.DestroyKey{Reason: "x"}); return err }, "label"},
		"no minutes":          {func() error { _, err := a.Ceremony(ctx, wire.Ceremony{}); return err }, "minutes"},
		"one person's backup": {func() error {
			_, err := a.BeginBackup(ctx, wire.BeginBackup{Persons: []string{"甲", "甲"}, Target: "/mnt"})
			return err
		}, "persons"},
		"backup without digest": {func() error {
			_, err := a.EndBackup(ctx, wire.EndBackup{ID: "0123456789abcdef", Size: 1, Entries: 1})
			return err
		}, "sm3"},
		"versions of nothing": {func() error {
			_, err := a.SkipVersions(ctx, wire.SkipVersions{Kind: "record", ID: "x", Reason: "x"})
			return err
		}, "kind"},
		"thawing nothing": {func() error {
			_, err := a.ThawObject(ctx, wire.ThawObject{Kind: "record", ID: "x", Reason: "x"})
			return err
		}, "kind"},
		"versions without reason": {func() error { _, err := a.SkipVersions(ctx, wire.SkipVersions{Kind: "signer", ID: "x"}); return err }, "reason"},
		"PIN missing":             {func() error { _, err := a.SetSignerPIN(ctx, wire.SetSignerPIN{Signer: "D1001"}); return err }, "pin"},
		"one person pairs": {func() error {
			_, err := a.AddPeer(ctx, wire.AddPeer{Card: []byte{1}, Fingerprint: "0", Persons: []string{"甲"}, Reason: "x"})
			return err
		}, "persons"},
		"pairing without fingerprint": {func() error {
			_, err := a.AddPeer(ctx, wire.AddPeer{Card: []byte{1}, Persons: []string{"甲", "乙"}, Reason: "x"})
			return err
		}, "fingerprint"},
		"pairing ended without reason": {func() error {
			_, err := a.RemovePeer(ctx, wire.RemovePeer{Persons: []string{"甲", "乙"}})
			return err
		}, "reason"},
		"PIN of nobody": {func() error {
			_, err := a.SetSignerPIN(ctx, wire.SetSignerPIN{Signer: "x", PIN: "1"})
			return err
		}, "path.id"},
		"stop without reason": {func() error { _, err := a.StopSigner(ctx, wire.Decision{ID: "D1001"}); return err }, "reason"},
		"stop bad id": {func() error {
			_, err := a.StopApplication(ctx, wire.Decision{ID: "HIS", Reason: "x"})
			return err
		}, "path.id"},
		"hold": {func() error {
			_, err := a.RevokeCertificate(ctx, wire.RevokeCertificate{Serial: "01", Reason: "certificateHold"})
			return err
		}, "reason"},
		"serial": {func() error {
			_, err := a.RevokeCertificate(ctx, wire.RevokeCertificate{Serial: "0G", Reason: "superseded"})
			return err
		}, "path.serial"},
	} {
		t.Run(name, func(t *testing.T) {
			var p *client.Problem
			if err := row.do(); !errors.As(err, &p) || p.Code != string(problem.InvalidRequest) || p.Field != row.field {
				t.Errorf("err = %v, want invalid_request (%s)", err, row.field)
			}
		})
	}
	if len(k.admin.asked) != 0 {
		t.Errorf("refused requests reached the service: %v", k.admin.asked)
	}
}

func TestAdminRefusesOtherUsers(t *testing.T) {
	t.Parallel()
	k := start(t)
	path := k.socket()
	if os.Getuid() != 0 {
		t.Skip("acting as another user needs root")
	}
	curl, err := exec.LookPath("curl")
	if err != nil {
		t.Skip("curl is missing")
	}
	// Even with the file's own protection gone, the kernel says who calls.
	for _, p := range []string{filepath.Dir(path), path} {
		if err := os.Chmod(p, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(curl, "-s", "--unix-socket", path, "http://yinjian/admin/v1/signers")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), `"code":"forbidden"`) {
		t.Errorf("another user got %s (%v), want forbidden", out, err)
	}
	if len(k.admin.asked) != 0 {
		t.Errorf("another user reached the service: %v", k.admin.asked)
	}
}

func TestAdminNeedsTheSocket(t *testing.T) {
	t.Parallel()
	k := start(t)
	srv := httptest.NewServer(k.server.AdminHandler())
	t.Cleanup(srv.Close)
	resp, err := http.Get(srv.URL + "/admin/v1/state")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("over TCP: %d, want 403", resp.StatusCode)
	}
	if got := k.do(call{method: "GET", path: "/admin/v1/state"}); got.status != 404 {
		t.Errorf("on the signing listener: %d, want 404", got.status)
	}
}

func TestListenAdmin(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := api.ListenAdmin(path)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket's mode = %v, %v", st.Mode(), err)
	}
	if _, err := api.ListenAdmin(path); err == nil {
		t.Error("a socket in use was taken over")
	}
	// A killed process leaves its socket behind.
	ln.(interface{ SetUnlinkOnClose(bool) }).SetUnlinkOnClose(false)
	ln.Close()
	for { // a program that another test starts at this moment holds the socket, too, until it is executed
		c, err := net.Dial("unix", path)
		if err != nil {
			break
		}
		c.Close()
	}
	ln, err = api.ListenAdmin(path)
	if err != nil {
		t.Fatalf("after a killed process: %v", err)
	}
	ln.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := api.ListenAdmin(path); err == nil {
		t.Error("a file that is no socket was removed")
	}
}

// A monitor on the machine reads metrics over the local socket, as text.
func TestMetrics(t *testing.T) {
	t.Parallel()
	path := start(t).socket()
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	defer c.CloseIdleConnections()
	r, err := c.Get("http://yinjian/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK || !strings.HasPrefix(r.Header.Get("Content-Type"), "text/plain; version=0.0.4") || string(b) != "yinjian_ready 1\n" {
		t.Errorf("%d %s: %s, %v", r.StatusCode, r.Header, b, err)
	}
}
