-- review: central-0010
-- makes: index yj_decision_by_intent
CREATE UNIQUE INDEX yj_decision_by_intent ON yj_decision (intent_id)
