"""The first question of `moeship verify`: are these the checkpoint's weights?"""
