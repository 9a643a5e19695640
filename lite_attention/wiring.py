from lite_attention.ops import Session

default_session = Session()
