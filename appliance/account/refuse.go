package account

import (
	"context"
	"errors"

	"yinjian/appliance/audit"
	"yinjian/appliance/problem"
	"yinjian/hsm"
)

// JournalProblem is for those who journal beside the directory.
func JournalProblem(err error) error { return journalProblem(err) }

// journalProblem makes a refusal of an error of the journal.
func journalProblem(err error) error {
	switch {
	case errors.Is(err, audit.ErrInvalidDraft):
		return problem.Invalid("request", "有内容超出记录格式的限制 (something is outside the limits of the record)").With(err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), errors.Is(err, audit.ErrOutcomeUnknown):
		return problem.New(problem.Timeout, "未能在时限内确认落盘，结果未知 (the record could not be confirmed in time)", "先查询现状，再决定是否重试 (look at the present state before trying again)").With(err)
	}
	return problem.New(problem.JournalUnwritable, "日志无法读写，操作未执行 (the journal cannot be read or written; nothing was changed)", "请管理员检查存储，查询现状后重试 (ask an administrator; look at the present state before trying again)").With(err)
}

// hsmProblem makes a refusal of an error of the cipher machine. Other errors pass.
func hsmProblem(err error) error {
	var rv *hsm.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, hsm.ErrNeedsOperator):
		return problem.New(problem.HSMNeedsOperator, "密码机拒绝了口令，已停止尝试 (the cipher machine refused its PIN; nothing is retried)", "请管理员检查密码机口令并重启服务 (ask an administrator)").With(err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), errors.Is(err, hsm.ErrDeadline):
		return problem.New(problem.Timeout, "等待密码机超时 (timed out waiting for the cipher machine)", "稍后重试 (try again later)").With(err)
	case errors.Is(err, hsm.ErrNoWrapping):
		return problem.New(problem.HSMUnavailable, "密码机不能包装托管密钥，或包装密钥不受信任 (the cipher machine wraps no keys, or the wrapping key is not trusted)",
			"核对 hsm.custody.kek 与密钥仪式、厂商档案 (compare hsm.custody.kek with the ceremony and the vendor profile)").With(err)
	case errors.Is(err, hsm.ErrUnavailable), errors.Is(err, hsm.ErrKeyNotFound), errors.Is(err, hsm.ErrBadSignature), errors.As(err, &rv):
		return problem.New(problem.HSMUnavailable, "密码机暂不可用 (the cipher machine is unavailable)", "稍后重试，仍失败请管理员检查密码机 (try again later, then ask an administrator)").With(err)
	}
	return err
}
