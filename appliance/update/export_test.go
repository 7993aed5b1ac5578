package update

// AgentAtOnce is how many questions an agent answers at once.
const AgentAtOnce = agentAtOnce

// Stop has f called after each step of a stage; an error ends it there, as a power cut would.
func (u *Updater) Stop(f func(step string) error) { u.stopped = f }
